#!/usr/bin/env bash
# Mid-training on a TPU v5p-64: the published run on another machine. Further arguments override, the last one wins:
#
#   bash pre-train/recipes/midtrain_v5p_64.sh [--dry_run] [key=value ...]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run_recipe.sh" midtrain v5p_64 "$@"
