#!/usr/bin/env bash
# HumanEval infilling of one model: single lines, several lines and random spans, gaps of the true length.
#
#   bash evaluation/lm_eval/eval_infilling.sh MODEL_DIR [lm-eval arguments ...]
#
# Environment: as in eval_mbpp_humaneval.sh, and GAP_LENGTH [true]: a number gives every gap that many tokens.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=evaluation/lm_eval/run_tasks.sh
source "$here/run_tasks.sh"

prefix=coda_humaneval
run_tasks "${TASKS:-${prefix}_single_line_infilling ${prefix}_multi_line_infilling ${prefix}_random_span_infilling}" \
  gaps "$@"
