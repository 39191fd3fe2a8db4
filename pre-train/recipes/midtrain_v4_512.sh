#!/usr/bin/env bash
# Mid-training on a TPU v4-512: the published run. Further arguments override, the last one wins:
#
#   bash pre-train/recipes/midtrain_v4_512.sh [--dry_run] [key=value ...]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run_recipe.sh" midtrain v4_512 "$@"
