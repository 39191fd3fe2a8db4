#!/usr/bin/env bash
# Train one stage on one machine, with the paths of pre-train/.env; the recipes are calls of this. Further arguments
# override, the last one wins:
#
#   bash pre-train/run_recipe.sh pretrain|midtrain MACHINE [--dry_run] [key=value ...]
#   bash pre-train/run_recipe.sh adapt MACHINE NAME masked|block [--dry_run] [key=value ...]
#
# MACHINE is a file of pre-train/configs/hardware. An adaptation starts from the backbone with its own tokenizer; NAME
# and objective name its run.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=load_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/load_env.sh"

stage=${1:-} machine=${2:-}
case $stage in
    pretrain) start=CODA_BACKBONE_DIR ;;
    midtrain) start=CODA_PRETRAINED_DIR ;;
    adapt) start=CODA_BACKBONE_DIR ;;
    *) start='' ;;
esac
name=${stage}_$machine tokenizer=CODA_TOKENIZER_DIR objective=()
if [[ $stage == adapt ]]; then
    name=${3:-}_${4:-} tokenizer=$start
    case ${4:-} in
        masked) ;;
        block) objective=(--config pre-train/configs/adapt_block.yaml) ;;
        *) start='' ;;
    esac
fi
if [[ -z $start || -z $machine ]]; then
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
shift 2
[[ $stage != adapt ]] || shift 2
require CODA_DATA_DIR CODA_OUTPUT_DIR "$tokenizer" "$start"

compiled=()
[[ $machine != v* ]] || compiled=(hardware.compilation_cache="$CODA_OUTPUT_DIR/xla_cache") # TPUs
exec bash "$coda_pretrain_dir/run_training.sh" \
    --config "pre-train/configs/$stage.yaml" \
    --config "pre-train/configs/hardware/$machine.yaml" \
    "${objective[@]}" \
    output_dir="$CODA_OUTPUT_DIR/$name" \
    checkpoint.folder="${CODA_CHECKPOINT_DIR:-$CODA_OUTPUT_DIR}/$name/checkpoints" \
    "${compiled[@]}" \
    data.root="$CODA_DATA_DIR" \
    model.init_from="${!start}" \
    model.tokenizer="${!tokenizer}" \
    "$@"
