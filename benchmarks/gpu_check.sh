#!/usr/bin/env bash
# MiniLM and stories260K on CUDA in fp32, bf16 and fp16, beside the CPU; at most 8 minutes on one GPU.
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu_check.py "$@"
