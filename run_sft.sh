#!/usr/bin/env bash
# Post-training through LLaMA-Factory: the published stage 1, then stage 2, or the given configurations in order.
#
#   bash run_sft.sh [CONFIG.yaml ...] [key=value ...]
#
#   bash run_sft.sh model_name_or_path=MODEL_DIR output_dir=runs/sft
#   bash run_sft.sh my.yaml model_name_or_path=MODEL_DIR output_dir=runs/mine learning_rate=1e-5 diffusion.t_min=0.01
#
# Each configuration after the first starts from the one before. With one configuration output_dir is its folder, with
# several each gets output_dir/NAME. The log is train.log there. An interrupted run continues from its last checkpoint,
# a finished one is not repeated. Several GPUs: as LLaMA-Factory (NPROC_PER_NODE, NNODES, ...). PYTHON chooses the
# interpreter, by default .venv/bin/python.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
examples=$root/post-train/LLaMA-Factory/examples/train_full
configs=()
overrides=()
model=""
output=""
for argument in "$@"; do
    case $argument in
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        model_name_or_path=*) model=${argument#*=} ;;
        output_dir=*) output=${argument#*=} ;;
        *.yaml | *.yml)
            if [[ $argument == *=* && ! -f $argument ]]; then overrides+=("$argument"); else configs+=("$argument"); fi ;;
        *=*) overrides+=("$argument") ;;
        *) echo "run_sft.sh: expected CONFIG.yaml or key=value, got '$argument'" >&2; exit 2 ;;
    esac
done
[ ${#configs[@]} -gt 0 ] || configs=("$examples/coda_sft_stage1.yaml" "$examples/coda_sft_stage2.yaml")

names=$(for config in "${configs[@]}"; do basename "${config%.*}"; done | sort | uniq -d)
if [ -n "$names" ]; then
    echo "run_sft.sh: several configurations are called $names and would share a folder; rename one" >&2
    exit 2
fi

python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
if ! "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('coda_posttrain') is None)"; then
    echo "run_sft.sh: coda_posttrain is not installed for $python; run: bash setup_env.sh" >&2
    exit 2
fi
setting() { # KEY CONFIG: its value there, with the overrides
    "$python" -m coda_posttrain get "$1" "$2" ${overrides[@]+"${overrides[@]}"}
}

# Whoever stops this script stops what it runs: a signal may come to it alone, and Ctrl-C, which a command in the
# background does not hear, comes to it as well.
child=""
stop() {
    [ -n "$child" ] || exit "$1"
    stopped=$1
    kill -TERM "$child" 2>/dev/null || true
}
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM

number=0
for config in "${configs[@]}"; do
    number=$((number + 1))
    name=$(basename "${config%.*}")
    stage="$name ($number of ${#configs[@]})"
    start=${model:-$(setting model_name_or_path "$config")}
    folder=${output:-$(setting output_dir "$config")}
    if [ -z "$start" ] || [ -z "$folder" ]; then
        echo "run_sft.sh: $stage needs model_name_or_path=FOLDER and output_dir=FOLDER" >&2
        exit 2
    fi
    if [ -n "$output" ] && [ ${#configs[@]} -gt 1 ]; then folder=$output/$name; fi
    if [ $number -lt ${#configs[@]} ] && [ "$(setting finetuning_type "$config")" = lora ]; then
        echo "run_sft.sh: $stage trains an adapter; merge it (coda_posttrain export) before the next configuration" >&2
        exit 2
    fi
    command=("$python" -m coda_posttrain train "$config" "model_name_or_path=$start" "output_dir=$folder"
        ${overrides[@]+"${overrides[@]}"})
    # What a finished run is compared with: its settings, and the model and the data by content.
    asked=$("$python" -m coda_posttrain identity "${command[@]:4}")
    if [ -f "$folder/.finished" ]; then
        if [ "$(cat "$folder/.finished")" != "$asked" ]; then
            echo "run_sft.sh: $folder holds a finished run with other settings, model or data; choose another output_dir" >&2
            exit 2
        fi
        echo "run_sft.sh: $stage is already finished in $folder"
    else
        mkdir -p -- "$folder"
        echo "run_sft.sh: $stage: $start -> $folder, log $folder/train.log"
        begin=$SECONDS
        exec 3> >(exec tee -ia -- "$folder/train.log")
        log=$! stopped="" status=0
        "${command[@]}" >&3 2>&1 3>&- &
        child=$!
        exec 3>&-
        while wait "$child" && status=0 || status=$?; kill -0 "$child" 2>/dev/null; do :; done # a signal ends a wait
        wait "$log" 2>/dev/null || true
        child=""
        if [ -n "$stopped" ] && [ "$status" -ne 0 ]; then
            echo "run_sft.sh: stopped in $stage; the same command continues from the last checkpoint" >&2
            exit "$stopped"
        fi
        if [ "$status" -ne 0 ]; then
            echo "run_sft.sh: FAILED in $stage; see $folder/train.log" >&2
            exit 1
        fi
        echo "$asked" >"$folder/.finished.new" && mv -- "$folder/.finished.new" "$folder/.finished"
        echo "run_sft.sh: $stage finished in $((SECONDS - begin)) s"
    fi
    model=$folder
done
echo "run_sft.sh: trained model in $model"
