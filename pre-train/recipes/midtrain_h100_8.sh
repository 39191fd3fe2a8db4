#!/usr/bin/env bash
# Mid-training on one box of 8 H100, under torchrun. Further arguments override, the last one wins:
#
#   bash pre-train/recipes/midtrain_h100_8.sh [--dry_run] [key=value ...]
CODA_PROCESSES=8 exec bash "$(dirname "${BASH_SOURCE[0]}")/../run_recipe.sh" midtrain h100_8 "$@"
