# Sourced by the evaluation scripts: run_tasks "TASK ..." chat|gaps MODEL_DIR [lm-eval arguments ...]
# runs all tasks in one process and logs it.
# shellcheck shell=bash

# json_object PYTHON NAME VALUE ...: an object of texts, but of numbers where a NAME ends in "=". Paths with commas,
# quotes or brackets, and folders named like numbers, are not what lm-eval's own key=value arguments can carry.
json_object() {
  "$1" -c '
import json, sys

def value(name, text):
    try:
        return json.loads(text) if name.endswith("=") else text
    except ValueError:
        return text

pairs = zip(sys.argv[1::2], sys.argv[2::2])
print(json.dumps({name.rstrip("="): value(name, text) for name, text in pairs}))' "${@:2}"
}

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
  local output="${OUTPUT_DIR:-runs/eval/$(basename -- "$model_dir")/$(date +%Y%m%d-%H%M%S)-$$}" old=""
  if [[ -d $output && " $* " != *" --resume "* ]]; then
    old="$(find "$output" \( -name 'results_*.json' -o -name 'journal_rank*.jsonl' -o -name scores.json \) -print -quit)"
  fi
  if [[ -n $old ]]; then
    echo "error: OUTPUT_DIR $output holds results of an earlier run ($old); name another folder, or add --resume" >&2
    return 2
  fi
  local gpus
  gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
  local dtype="${DTYPE:-$([[ $gpus -gt 0 ]] && echo bfloat16 || echo float32)}"
  local processes="${NUM_PROCESSES:-$((gpus > 1 ? gpus : 1))}"

  local -a settings=(pretrained "$model_dir" dtype "$dtype") generation=()
  if [[ $model == coda || $model == diffllm ]]; then
    settings+=(steps= "${STEPS:-768}" alg "${ALG:-entropy}" temperature= "${TEMPERATURE:-0.1}" top_p= "${TOP_P:-0.9}")
    settings+=(max_new_tokens= "${MAX_NEW_TOKENS:-768}")
  elif [[ -n ${STEPS:-}${ALG:-} ]]; then
    echo "error: STEPS and ALG say nothing with MODEL=$model, which denoises nothing: unset them" >&2
    return 2
  else
    if [[ -n ${MAX_NEW_TOKENS:-} ]]; then generation+=(max_gen_toks= "$MAX_NEW_TOKENS"); fi
    if [[ -n ${TEMPERATURE:-} ]]; then
      generation+=(temperature= "$TEMPERATURE" do_sample= "$([[ $TEMPERATURE =~ ^[0.]*$ ]] && echo false || echo true)")
    fi
    if [[ -n ${TOP_P:-} ]]; then generation+=(top_p= "$TOP_P"); fi
  fi
  local model_args
  model_args="$(json_object "$python" "${settings[@]}")"
  local -a launcher=("$python") options=() names=()
  read -r -d '' -a names <<<"$tasks" || true
  if [[ $processes -gt 1 ]]; then
    launcher=("$python" -m torch.distributed.run --standalone --log-dir=/dev/null --nproc_per_node "$processes")
    if [[ $gpus -eq 0 ]]; then export ACCELERATE_USE_CPU=true; fi
  fi
  if [[ $gpus -eq 0 ]]; then options+=(--device cpu); fi
  if [[ $prompts == chat ]]; then
    options+=(--apply_chat_template)
  elif [[ ${GAP_LENGTH:-true} == true ]]; then
    options+=(--metadata '{"gap_length": "true"}')
  else
    options+=(--metadata "$(json_object "$python" gap_length= "$GAP_LENGTH")")
  fi
  if [[ ${#generation[@]} -gt 0 ]]; then options+=(--gen_kwargs "$(json_object "$python" "${generation[@]}")"); fi
  if [[ -n ${LIMIT:-} ]]; then options+=(--limit "$LIMIT"); fi

  mkdir -p "$output"
  : >>"$output/run.log"
  echo "== ${names[*]}: $model_args -> $output"
  # In the place of this shell, so that a signal to it reaches the run; tee writes to the end what Ctrl-C makes it say.
  exec "${launcher[@]}" -m coda_eval run --model "$model" --model_args "$model_args" --tasks "${names[@]}" \
    --batch_size "${BATCH_SIZE:-32}" --output_path "$output" --log_samples "${options[@]}" "$@" \
    > >(exec tee -ia -- "$output/run.log") 2>&1
}
