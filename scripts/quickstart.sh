#!/usr/bin/env bash
# From a fresh clone to a verified stock checkpoint: makes .venv, installs, trains on a small set in the
# repository with real pretrained weights, evaluates, merges, and asks plain transformers.
. "$(dirname "$0")/setup.sh" demo
export HF_HUB_OFFLINE=1 # everything that is needed is here

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

say ticktune train recipes/support.yaml
say ticktune eval runs/support
say ticktune export runs/support --merge

printf '\n\033[1mThe merged folder in three lines of plain transformers:\033[0m\n'
python - <<'PY'
from transformers import pipeline
classify = pipeline("text-classification", "runs/support/merged")
print(classify("you took the money twice this month, please send one of them back"))
PY

printf '\n\033[1mFor comparison, the head alone:\033[0m\n'
say ticktune --quiet train recipes/support.yaml ticks.dim=0 norms.train=none optimizer.head_lr=1e-2 output=runs/support-head
python scripts/compare.py recipes/support/test.jsonl intent "head alone"=runs/support-head "ticks + norms"=runs/support
