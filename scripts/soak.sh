#!/usr/bin/env bash
# Kills, signals and full disks at every place of a tiny run and its export. What survived goes kind by kind to
# benchmarks/results/faults.json. --only PART runs the kinds whose names hold PART, and writes nothing.
. "$(dirname "$0")/setup.sh" test
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
python -m tests.reliability.soak "$@"
