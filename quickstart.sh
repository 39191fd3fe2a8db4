#!/usr/bin/env bash
# The whole CoDA loop on two CPU cores: data, tokenizer, pre-, mid- and post-training, evaluation, server, report.
#
#   bash quickstart.sh                 runs what is not done yet, in runs/quickstart
#   bash quickstart.sh --fresh         starts over
#   bash quickstart.sh --serve         leaves the server running at the end
#   bash quickstart.sh --demo          shows a chat and an infilling, canvas in view, as soon as fine-tuning has ended
#   bash quickstart.sh --compare       also trains and scores a model that attends by blocks, on the same tokens
#   bash quickstart.sh --seeds 0,1,2   also trains and scores models from other seeds, on the same data
#   bash quickstart.sh --run_dir DIR   another run folder; the default is in the folder of this script
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case "${1:-}" in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
bash "$root/setup_env.sh"
export PYTHONDONTWRITEBYTECODE=   # byte code is compiled on first use, and each stage would compile it anew
export USE_TORCH_XLA=0   # the loop trains on plain PyTorch; torch_xla would take the devices over
exec "$root/.venv/bin/python" -m coda_quickstart run "$@"
