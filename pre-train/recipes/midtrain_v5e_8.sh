#!/usr/bin/env bash
# Mid-training on a TPU v5e-8: the published run on another machine. Further arguments override, the last one wins:
#
#   bash pre-train/recipes/midtrain_v5e_8.sh [--dry_run] [key=value ...]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run_recipe.sh" midtrain v5e_8 "$@"
