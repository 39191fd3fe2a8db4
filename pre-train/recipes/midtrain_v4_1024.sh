#!/usr/bin/env bash
# Mid-training on a TPU v4-1024: the published run on another machine. Further arguments override, the last one wins:
#
#   bash pre-train/recipes/midtrain_v4_1024.sh [--dry_run] [key=value ...]
#
# A step has 256 rows and the machine 512 chips, so two chips share each row.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run_recipe.sh" midtrain v4_1024 hardware.mesh.fsdp=256 hardware.mesh.tensor=2 "$@"
