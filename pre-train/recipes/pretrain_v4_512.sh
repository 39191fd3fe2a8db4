#!/usr/bin/env bash
# Pre-training on a TPU v4-512: the published run on another machine. Further arguments override, the last one wins:
#
#   bash pre-train/recipes/pretrain_v4_512.sh [--dry_run] [key=value ...]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run_recipe.sh" pretrain v4_512 "$@"
