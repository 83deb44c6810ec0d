#!/usr/bin/env bash
# All checks that people and CI run: format, lint, types, tests. --all adds the slow tests.
# Real-data tests run where TICKTUNE_DATA names the folder with the data sets, and say so where it does not.
. "$(dirname "$0")/setup.sh" test
export HF_HUB_OFFLINE=1

ruff format --check .
ruff check .
mypy
if [ "${1:-}" = "--all" ]; then
  shift
  python -m pytest "$@"
else
  python -m pytest -m "not slow and not consumers" "$@"
fi
