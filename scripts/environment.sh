# Sourced by quickstart.sh and test.sh: makes .venv and installs a requirements file into it, once.
# Usage: . scripts/environment.sh requirements.txt

find_python() {
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10 python; do
    if [ -n "$candidate" ] && "$candidate" -c \
      'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "LadderLM needs Python 3.10 to 3.13; none was found. Name one: PYTHON=/path/to/python3" >&2
  return 1
}

requirements=$1
python=$(find_python) || exit 1
if [ ! -x .venv/bin/python ] && [ ! -x .venv/Scripts/python ]; then
  echo "making .venv with $("$python" --version)"
  "$python" -m venv .venv
fi
programs=.venv/bin
[ -d "$programs" ] || programs=.venv/Scripts # Windows, in Git's bash; not run here
stamp=.venv/installed-$(cat requirements*.txt pyproject.toml | cksum | cut -d' ' -f1)-$requirements
if [ ! -f "$stamp" ]; then
  echo "installing $requirements (a few minutes the first time)"
  "$programs/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
  touch "$stamp"
fi
# The embedded recipes need nothing from outside: no model, data set, kernel or telemetry.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 PYTHONUTF8=1
PATH=$PWD/$programs:$PATH
