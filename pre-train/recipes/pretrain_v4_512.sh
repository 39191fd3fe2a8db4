#!/usr/bin/env bash
# Pre-training on a TPU v4-512: the published run on another machine. Further arguments override, the last one wins:
#
#   bash pre-train/recipes/pretrain_v4_512.sh [--dry_run] [key=value ...]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR/.. source=load_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../load_env.sh"
require CODA_DATA_DIR CODA_OUTPUT_DIR CODA_TOKENIZER_DIR CODA_BACKBONE_DIR

exec bash "$coda_pretrain_dir/run_training.sh" \
    --config pre-train/configs/pretrain.yaml \
    --config pre-train/configs/hardware/v4_512.yaml \
    output_dir="$CODA_OUTPUT_DIR/pretrain_v4_512" \
    checkpoint.folder="${CODA_CHECKPOINT_DIR:-$CODA_OUTPUT_DIR}/pretrain_v4_512/checkpoints" \
    hardware.compilation_cache="$CODA_OUTPUT_DIR/xla_cache" \
    data.root="$CODA_DATA_DIR" \
    model.init_from="$CODA_BACKBONE_DIR" \
    model.tokenizer="$CODA_TOKENIZER_DIR" \
    "$@"
