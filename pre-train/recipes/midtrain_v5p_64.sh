#!/usr/bin/env bash
# Mid-training on a TPU v5p-64: the published run on another machine. Further arguments override, the last one wins:
#
#   bash pre-train/recipes/midtrain_v5p_64.sh [--dry_run] [key=value ...]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR/.. source=load_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../load_env.sh"
require CODA_DATA_DIR CODA_OUTPUT_DIR CODA_TOKENIZER_DIR CODA_PRETRAINED_DIR

exec bash "$coda_pretrain_dir/run_training.sh" \
    --config pre-train/configs/midtrain.yaml \
    --config pre-train/configs/hardware/v5p_64.yaml \
    output_dir="$CODA_OUTPUT_DIR/midtrain_v5p_64" \
    checkpoint.folder="${CODA_CHECKPOINT_DIR:-$CODA_OUTPUT_DIR}/midtrain_v5p_64/checkpoints" \
    hardware.compilation_cache="$CODA_OUTPUT_DIR/xla_cache" \
    data.root="$CODA_DATA_DIR" \
    model.init_from="$CODA_PRETRAINED_DIR" \
    model.tokenizer="$CODA_TOKENIZER_DIR" \
    "$@"
