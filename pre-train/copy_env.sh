#!/usr/bin/env bash
# Copy pre-train/.env (or the file CODA_ENV_FILE names) to every machine of the TPU pod TPU_NAME:
#
#   bash pre-train/copy_env.sh
#
# A run on the pod reads it there: WANDB_API_KEY and other secrets reach the run by this file only, which is written with
# access for the owner alone. Paths of a recipe come as arguments and need no copy.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=load_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/load_env.sh"

if (($# > 0)); then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
require TPU_NAME TPU_ZONE TPU_PROJECT CODA_REPO_DIR
file=${CODA_ENV_FILE:-$coda_pretrain_dir/.env}
[[ -s $file ]] || { printf 'nothing to copy: %s is missing or empty (see %s)\n' "$file" "$coda_pretrain_dir/env.example" >&2 && exit 2; }

pod=(--zone "$TPU_ZONE" --project "$TPU_PROJECT" --worker=all)
target=$CODA_REPO_DIR/pre-train/.env
# Made with its permissions before anything is in it: a copy keeps those of a file that is there.
gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${pod[@]}" \
    --command "umask 077 && touch $(printf '%q' "$target") && chmod 600 $(printf '%q' "$target")"
gcloud compute tpus tpu-vm scp "$file" "$TPU_NAME:$target" "${pod[@]}"
