#!/usr/bin/env bash
# From a fresh machine to an aligned chat model and its report card: bash scripts/quickstart.sh [RECIPE]
# Or let the machine choose: bash scripts/quickstart.sh --auto [--minutes 15] [--network]
# Run it again at any time: what is finished is skipped, what was interrupted goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${1:-tiny}
if [ "$recipe" != --auto ] && [ ! -d "configs/$recipe" ]; then
  echo "there is no recipe configs/$recipe; there are: $(cd configs && echo */sft.yaml)" >&2
  exit 1
fi
. scripts/environment.sh requirements.txt
command="python scripts/pipeline.py configs/$recipe"
if [ "$recipe" = --auto ]; then
  echo "chosen for this machine:"
  command=$(python scripts/auto.py "${@:2}")
  recipe=${command#*configs/}
  recipe=${recipe%% *}
  echo "  $command"
fi
# Public data is the one thing that these recipes need from outside.
grep -q data/generated "configs/$recipe/tokenizer.yaml" || export HF_HUB_OFFLINE=0 HF_DATASETS_OFFLINE=0
$command
other=smoke
[ "$recipe" = smoke ] && other=tiny
cat <<TEXT

What to type next (first: source .venv/bin/activate):
  python -m sft.chat output/$recipe/grpo        # talk to the result
  python -m webbrowser output/$recipe/report.html   # open the report card
  bash scripts/quickstart.sh $other              # run another recipe
TEXT
