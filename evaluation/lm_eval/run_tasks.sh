# Sourced by the evaluation scripts: run_tasks "TASK ..." chat|plain MODEL_DIR [lm-eval arguments ...]
# runs one task after the other, logs each, and writes a score card of all.
# shellcheck shell=bash

run_tasks() {
  local tasks="$1" prompts="$2"
  shift 2
  if [[ $# -lt 1 || "$1" == --* ]]; then
    echo "usage: bash $0 MODEL_DIR [lm-eval arguments ...]" >&2
    return 2
  fi
  local model_dir="$1"
  shift
  local repository python="${PYTHON:-}" model="${MODEL:-coda}"
  repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
  if [[ -z $python ]]; then
    python="$repository/.venv/bin/python"
    [[ -x $python ]] || python=python
  fi
  if ! "$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("coda_eval", "lm_eval"))))'; then
    echo "error: $python has no coda_eval; run: bash $repository/setup_env.sh (or set PYTHON)" >&2
    return 2
  fi
  local output="${OUTPUT_DIR:-runs/eval/$(basename "$model_dir")}"
  local gpus
  gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
  local dtype="${DTYPE:-$([[ $gpus -gt 0 ]] && echo bfloat16 || echo float32)}"
  local processes="${NUM_PROCESSES:-$((gpus > 1 ? gpus : 1))}"

  local settings="pretrained=$model_dir,dtype=$dtype"
  if [[ $model == coda || $model == diffllm ]]; then
    settings+=",steps=${STEPS:-768},alg=${ALG:-entropy},temperature=${TEMPERATURE:-0.1},top_p=${TOP_P:-0.9}"
    settings+=",max_new_tokens=${MAX_NEW_TOKENS:-768}"
  fi
  local -a launcher=("$python") options=()
  if [[ $processes -gt 1 ]]; then
    launcher=("$python" -m torch.distributed.run --standalone --nproc_per_node "$processes")
    if [[ $gpus -eq 0 ]]; then export ACCELERATE_USE_CPU=true; fi
  fi
  if [[ $gpus -eq 0 ]]; then options+=(--device cpu); fi
  if [[ $prompts == chat ]]; then options+=(--apply_chat_template); fi
  if [[ -n ${LIMIT:-} ]]; then options+=(--limit "$LIMIT"); fi

  mkdir -p "$output"
  local task
  for task in $tasks; do
    echo "== $task: $settings"
    "${launcher[@]}" -m coda_eval run --model "$model" --model_args "$settings" --tasks "$task" \
      --batch_size "${BATCH_SIZE:-32}" --output_path "$output" --log_samples "${options[@]}" "$@" \
      2>&1 | tee "$output/$task.log"
  done
  "$python" -m coda_eval.report "$output" --output "$output/scores.json"
}
