#!/usr/bin/env bash
# Other tools open merged folders and are compared with ticktune's own predictions: sentence-transformers, ONNX Runtime,
# CTranslate2, and the pipelines of transformers. --write also writes what was measured to benchmarks/results.
# TICKTUNE_MODELS names the folder with stories260K-hf/; the tests that need it say so where it does not.
. "$(dirname "$0")/setup.sh" consumers
export HF_HUB_OFFLINE=1

if [ "${1:-}" = "--write" ]; then
  shift
  export TICKTUNE_CONSUMERS="$PWD/benchmarks/results/consumers.json"
  python -m pytest -m consumers "$@"
  python scripts/consumers.py
else
  python -m pytest -m consumers "$@"
fi
