#!/usr/bin/env bash
# Everything a change must pass: lint, unit tests, the smoke recipe through the real launchers.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements-dev.txt
ruff check .
python -m pytest -q "$@"
