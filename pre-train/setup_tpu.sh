#!/usr/bin/env bash
# Make every machine of a TPU pod ready to train; running it again only does what is missing.
#
#   bash pre-train/setup_tpu.sh          from your own machine: all machines of TPU_NAME, through gcloud
#   bash pre-train/setup_tpu.sh --here   on a TPU machine: this one only
#
# Settings are read from pre-train/.env (see env.example). With CODA_BUCKET set, the bucket is mounted too.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=load_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/load_env.sh"

setup_pod() {
    require TPU_NAME TPU_ZONE TPU_PROJECT CODA_REPO_URL CODA_REPO_DIR
    local directory url settings='' name
    directory=$(printf '%q' "$CODA_REPO_DIR") url=$(printf '%q' "$CODA_REPO_URL")
    for name in CODA_BUCKET CODA_MOUNT_DIR; do
        settings+="$name=$(printf '%q' "${!name:-}") "
    done
    exec gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone "$TPU_ZONE" --project "$TPU_PROJECT" --worker=all \
        --command "set -e; if [ -d $directory/.git ]; then git -C $directory pull --ff-only; \
else git clone $url $directory; fi; $settings bash $directory/pre-train/setup_tpu.sh --here"
}

# Python 3.11 with venv: from the system's packages, else from the deadsnakes archive of Ubuntu packages.
install_python() {
    if python3.11 -c 'import venv, ensurepip' 2>/dev/null; then
        return
    fi
    sudo apt-get update -q
    sudo apt-get install -qy python3.11 python3.11-venv || {
        sudo apt-get install -qy software-properties-common
        sudo add-apt-repository -y ppa:deadsnakes/ppa
        sudo apt-get install -qy python3.11 python3.11-venv
    }
}

# .venv with this room's dependencies in the tested versions, and libtpu. The stamp says for which files it was made.
install_packages() {
    local repo=$1 stamp wanted
    stamp=$repo/.venv/.complete-tpu
    wanted=$(cat "$repo/pyproject.toml" "$repo/constraints.txt" | sha256sum | cut -d ' ' -f 1)
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        printf 'packages are up to date\n'
        return
    fi
    [[ -x $repo/.venv/bin/python ]] || python3.11 -m venv "$repo/.venv"
    "$repo/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$repo/constraints.txt" --editable "${repo}[xla]" 'torch_xla[tpu]'
    printf '%s\n' "$wanted" >"$stamp"
}

mount_bucket() {
    require CODA_MOUNT_DIR
    if mountpoint -q "$CODA_MOUNT_DIR"; then
        printf '%s is mounted\n' "$CODA_MOUNT_DIR"
        return
    fi
    command -v gcsfuse >/dev/null || {
        printf 'CODA_BUCKET is set, but gcsfuse is not installed; install it or leave CODA_BUCKET empty\n' >&2
        return 2
    }
    mkdir -p "$CODA_MOUNT_DIR"
    # A store renames a folder file by file, which gcsfuse refuses beyond this many of them (0 without the option).
    gcsfuse --implicit-dirs --rename-dir-limit=1000000 "$CODA_BUCKET" "$CODA_MOUNT_DIR"
}

setup_here() {
    local repo
    repo=$(cd "$coda_pretrain_dir/.." && pwd)
    install_python
    install_packages "$repo"
    if [[ -n ${CODA_BUCKET:-} ]]; then
        mount_bucket
    fi
    "$repo/.venv/bin/python" -c 'import torch_xla, coda_pretrain; print("ready: torch_xla", torch_xla.__version__)'
}

case "${1:-}" in
    "") setup_pod ;;
    --here) setup_here ;;
    *)
        sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
