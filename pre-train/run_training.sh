#!/usr/bin/env bash
# Run the trainer with these arguments: on this machine, or, when TPU_NAME is set, on every machine of that TPU pod.
# With CODA_PROCESSES=N, N processes of this machine, one for each GPU, train together under torchrun.
#
#   bash pre-train/run_training.sh --config A.yaml --config B.yaml [--dry_run] [key=value ...]
#
#   bash pre-train/run_training.sh --follow | --status | --stop    of the run on the pod TPU_NAME
#
# --dry_run always runs here: it resolves and prints the configuration and touches no device. Relative paths start
# from the root of the repository. Running the same command again continues from the newest checkpoint. On a pod the
# run is detached: a lost connection or Ctrl-C ends the view of its log and not the run.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=load_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/load_env.sh"

if (($# == 0)); then
    sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
dry_run=false
for argument in "$@"; do
    [[ $argument != --dry_run ]] || dry_run=true
done

if [[ -n ${TPU_NAME:-} && -z ${CODA_PROCESSES:-} && $dry_run == false ]]; then
    require TPU_ZONE TPU_PROJECT CODA_REPO_DIR
    # on WORKERS WORD...: pod_run.sh with these words on those machines of the pod.
    on() {
        gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone "$TPU_ZONE" --project "$TPU_PROJECT" --worker="$1" \
            --command "bash $(printf '%q' "$CODA_REPO_DIR/pre-train/pod_run.sh")$(printf ' %q' "${@:2}")"
    }
    case $1 in
        --follow) ;;
        --status | --stop)
            on all "${1#--}"
            exit
            ;;
        *)
            on all start "$@"
            printf 'following the log of machine 0; the run goes on without this view\n'
            ;;
    esac
    on 0 follow
    exit
fi

cd "$coda_pretrain_dir/.."
launcher=()
if [[ -n ${CODA_PROCESSES:-} && $dry_run == false ]]; then
    launcher=(-m torch.distributed.run --standalone --log-dir=/dev/null --nproc_per_node "$CODA_PROCESSES")
fi
exec "$(find_python)" "${launcher[@]}" -m coda_pretrain "$@"
