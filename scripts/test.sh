#!/usr/bin/env bash
# All checks that people and CI run: format, lint, types, tests. --all adds the slow tests.
# Real-data tests run where TICKTUNE_DATA names the folder with the data sets, and say so where it does not.
. "$(dirname "$0")/setup.sh" test
export HF_HUB_OFFLINE=1

ruff format --check .
ruff check .
mypy
chosen=(-m "not slow and not consumers")
if [ "${1:-}" = "--all" ]; then
  shift
  chosen=()
fi
# One worker for each core, on one thread; the tests of a file share fixtures.
python -m pytest -n auto --dist loadfile "${chosen[@]}" "$@"
