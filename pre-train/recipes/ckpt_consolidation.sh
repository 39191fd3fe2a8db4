#!/usr/bin/env bash
# Turn checkpoints of a run into safetensors, on any machine, without a TPU. RUN is a run's folder, or the folder or URL
# of its checkpoints (gs://BUCKET/RUN):
#
#   bash pre-train/recipes/ckpt_consolidation.sh RUN OUTPUT            the newest checkpoint of the run folder, to OUTPUT
#   bash pre-train/recipes/ckpt_consolidation.sh RUN OUTPUT STEP ...   each of these steps, to OUTPUT/step-XXXXXXXX
#
# `python save_hf_model.py --checkpoint_dir OUTPUT --output_dir MODEL` then makes a folder that loads by itself.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR/.. source=load_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../load_env.sh"

if (($# < 2)); then
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
run=$1 output=$2
shift 2
python=$(find_python)
export PJRT_DEVICE=${PJRT_DEVICE:-CPU}

if (($# == 0)); then
    exec "$python" -m coda_pretrain export --checkpoint_dir "$run" --output_dir "$output"
fi
for step in "$@"; do
    [[ $step =~ ^[0-9]+$ ]] || { printf 'a step must be a whole number, got %s\n' "$step" >&2 && exit 2; }
done
for step in "$@"; do
    folder=$output/$(printf 'step-%08d' "$((10#$step))")
    "$python" -m coda_pretrain export --checkpoint_dir "$run" --step "$((10#$step))" --output_dir "$folder"
done
