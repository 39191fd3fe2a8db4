#!/usr/bin/env bash
# Qwen2.5-Coder-0.5B becomes a diffusion model on one GPU, of full attention (masked) or by blocks of 32 (block).
# Further arguments override, the last one wins:
#
#   bash pre-train/recipes/adapt_qwen25_coder_05b.sh masked|block [--dry_run] [key=value ...]
#
# CODA_BACKBONE_DIR is the folder of Qwen/Qwen2.5-Coder-0.5B: its weights start the run, and the mask
# token is added to its tokenizer. Before, for NAME = fine-code and opencoder-annealing (the first command prints the
# second one in full):
#
#   python -m coda_pretrain download pre-train/configs/data/NAME.yaml --output corpora
#   python -m coda_pretrain data --input corpora/NAME/... --tokenizer CODA_BACKBONE_DIR --output CODA_DATA_DIR/NAME
#
# What it needs of an H100, as a plan that assumes an MFU of 40 % (nothing is measured):
# 13.3 GiB and 0.41 days masked, 18.8 GiB and 0.74 days by blocks. The plan is printed by this command, with
# --config pre-train/configs/adapt_block.yaml too for the model by blocks:
#
#   python -m coda_pretrain plan --config pre-train/configs/adapt.yaml --config pre-train/configs/hardware/gpu.yaml \
#       --device 1xH100 --document_tokens 512 model.init_from=CODA_BACKBONE_DIR micro_batch_size=16
#
# After, the folder that loads by itself, and its scores: HumanEval infilling, pass@1, and pass@1 and pass@10 of ten
# answers. A model by blocks fills a gap only where the right side is in the gap's block: skip infilling for it.
#
#   bash pre-train/recipes/ckpt_consolidation.sh CODA_OUTPUT_DIR/adapt_qwen25_coder_05b_masked EXPORT_DIR
#   python save_hf_model.py --checkpoint_dir EXPORT_DIR --output_dir MODEL_DIR    (of CODA_BACKBONE_DIR: the start)
#   bash evaluation/lm_eval/eval_infilling.sh MODEL_DIR
#   TASKS=coda_humaneval bash evaluation/lm_eval/eval_mbpp_humaneval.sh MODEL_DIR
#   TASKS=coda_humaneval_10 TEMPERATURE=0.8 bash evaluation/lm_eval/eval_mbpp_humaneval.sh MODEL_DIR
CODA_PROCESSES=1 exec bash "$(dirname "${BASH_SOURCE[0]}")/../run_recipe.sh" adapt gpu adapt_qwen25_coder_05b "${1:-}" \
    micro_batch_size=16 "${@:2}"
