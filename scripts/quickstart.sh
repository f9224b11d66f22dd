#!/usr/bin/env bash
# From a fresh machine to an aligned chat model and its report card: bash scripts/quickstart.sh [RECIPE]
# Run it again at any time: what is finished is skipped, what was interrupted goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${1:-tiny}
if [ ! -d "configs/$recipe" ]; then
  echo "there is no recipe configs/$recipe; there are: $(cd configs && echo */sft.yaml)" >&2
  exit 1
fi
. scripts/environment.sh requirements.txt
python scripts/pipeline.py "configs/$recipe"
other=smoke
[ "$recipe" = smoke ] && other=tiny
cat <<TEXT

What to type next (first: source .venv/bin/activate):
  python -m sft.chat output/$recipe/grpo        # talk to the result
  python -m webbrowser output/$recipe/report.html   # open the report card
  bash scripts/quickstart.sh $other              # run another recipe
TEXT
