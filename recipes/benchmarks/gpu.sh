#!/usr/bin/env bash
# Measures on a GPU what was proven on CPUs alone, in at most nine minutes and without a network:
#
#   recipes/benchmarks/gpu.sh                        # everything; results in runs/gpu
#   recipes/benchmarks/gpu.sh --only ppo_small,tests
#   recipes/benchmarks/gpu.sh --tiny                 # tiny shapes, on a CPU too: whether every part runs
#   recipes/benchmarks/gpu.sh --vllm_python ~/vllm/bin/python    # vLLM's own environment, where it is not .venv-vllm
#
# PYTHON names the interpreter (3.11 or newer, with torch). See gpu.py.
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" "$here/gpu.py" "$@"
