#!/usr/bin/env bash
# Pre-training on a TPU v5p-64: the published run on another machine. Further arguments override, the last one wins:
#
#   bash pre-train/recipes/pretrain_v5p_64.sh [--dry_run] [key=value ...]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run_recipe.sh" pretrain v5p_64 "$@"
