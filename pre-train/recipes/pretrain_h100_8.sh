#!/usr/bin/env bash
# Pre-training on one box of 8 H100, under torchrun. Further arguments override, the last one wins:
#
#   bash pre-train/recipes/pretrain_h100_8.sh [--dry_run] [key=value ...]
CODA_PROCESSES=8 exec bash "$(dirname "${BASH_SOURCE[0]}")/../run_recipe.sh" pretrain h100_8 "$@"
