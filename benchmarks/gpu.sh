#!/usr/bin/env bash
# What the code does on the GPU of this machine, in minutes; without one, on the CPU in tiny shapes:
#
#   bash benchmarks/gpu.sh [--seconds 540] [--sections kernels,decoding] [--output DIR] [--weights FOLDER] [--tiny]
#
# Nothing need be installed: of the interpreter (PYTHON, by default python3) it wants torch, transformers, safetensors,
# numpy, PyYAML, rich and tokenizers. DIR (benchmarks/gpu_results) receives gpu.json, gpu.md and gpu.log, which grow as it
# goes. FOLDER is SmolLM2-135M as a Hugging Face folder; a random model of its shape is adapted without it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
rooms=$root:$root/pre-train:$root/post-train:$root/benchmarks
export PYTHONPATH=$rooms${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=true HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 USE_TORCH_XLA=0
exec "${PYTHON:-python3}" -m gpu "$@"
