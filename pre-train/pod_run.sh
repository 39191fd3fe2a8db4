#!/usr/bin/env bash
# A run of this machine that outlives the connection which started it; run_training.sh calls this on a pod's machines.
#
#   bash pre-train/pod_run.sh start ARGUMENT ...   start `python -m coda_pretrain ARGUMENT ...`, detached, with a log
#   bash pre-train/pod_run.sh follow               show the log until the run ends; the exit status is that of the run
#   bash pre-train/pod_run.sh status               whether it runs, and the end of its log
#   bash pre-train/pod_run.sh stop                 SIGTERM: the run saves a checkpoint and ends
#
# Settings are read from pre-train/.env of this machine (WANDB_API_KEY, say; see copy_env.sh). Log, process id and exit
# status lie in runs/pod of the repository, or in CODA_LOG_DIR.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=load_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/load_env.sh"

cd "$coda_pretrain_dir/.."
folder=${CODA_LOG_DIR:-runs/pod}
mkdir -p "$folder"

# The run holds this lock, so a process id that was given away again is never taken for it.
is_running() {
    ! flock --nonblock "$folder/lock" true
}

run_here() {
    local status=0 child
    "$(find_python)" -m coda_pretrain "$@" &
    child=$!
    printf '%s\n' "$child" >"$folder/pid"
    # A signal interrupts `wait`; the run's own end is what counts.
    trap 'kill -TERM "$child" 2>/dev/null || true' TERM
    while wait "$child" || status=$?; kill -0 "$child" 2>/dev/null; do status=0; done
    printf '%s\n' "$status" >"$folder/status"
}

case "${1:-}" in
    start)
        shift
        if is_running; then
            printf '%s: a run is going on here already (process %s): follow it, or stop it first\n' \
                "$(hostname)" "$(<"$folder/pid")" >&2
            exit 1
        fi
        rm -f "$folder/status" "$folder/pid"
        log=$folder/$(date -u +%Y%m%dT%H%M%SZ).log
        ln -sfn "$(basename "$log")" "$folder/newest.log"
        PJRT_DEVICE=${PJRT_DEVICE:-TPU} setsid nohup flock --nonblock --close "$folder/lock" \
            bash "$coda_pretrain_dir/pod_run.sh" run-here "$@" >"$log" 2>&1 </dev/null &
        for _ in {1..100}; do # from here on it is running, or has ended
            [[ ! -e $folder/pid ]] || break
            sleep 0.1
        done
        printf '%s: started, its log is %s\n' "$(hostname)" "$(realpath "$log")"
        ;;
    run-here)
        shift
        run_here "$@"
        ;;
    follow)
        [[ -e $folder/newest.log ]] || { printf 'no run was started here\n' >&2 && exit 2; }
        tail -n 100 -F "$folder/newest.log" 2>/dev/null &
        reader=$!
        trap 'kill "$reader" 2>/dev/null || true' EXIT
        while is_running; do sleep 1; done
        sleep 1 # the last lines
        exit "$(cat "$folder/status" 2>/dev/null || echo 1)"
        ;;
    status)
        if is_running; then
            printf '%s: running (process %s)\n' "$(hostname)" "$(<"$folder/pid")"
        else
            printf '%s: not running, exit status %s\n' "$(hostname)" "$(cat "$folder/status" 2>/dev/null || echo unknown)"
        fi
        [[ ! -e $folder/newest.log ]] || tail -n 5 "$folder/newest.log"
        ;;
    stop)
        is_running || { printf '%s: nothing is running\n' "$(hostname)" && exit 0; }
        kill -TERM "$(<"$folder/pid")"
        printf '%s: told to stop\n' "$(hostname)"
        ;;
    *)
        sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
