#!/usr/bin/env bash
# Pre-training on a TPU v4-1024: the published run. Further arguments override, the last one wins:
#
#   bash pre-train/recipes/pretrain_v4_1024.sh [--dry_run] [key=value ...]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run_recipe.sh" pretrain v4_1024 "$@"
