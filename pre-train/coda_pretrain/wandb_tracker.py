"""Weights & Biases, imported only when ``metrics.wandb`` asks for it."""

import hashlib
from pathlib import Path
from typing import Any

import wandb

from .config import WandbConfig


def start_tracker(config: WandbConfig, output_dir: str, run_config: dict[str, Any]) -> Any:
    """A W&B run that a resumed process continues: its id comes from the run folder."""
    run_id = hashlib.sha256(str(Path(output_dir).resolve()).encode()).hexdigest()[:16]
    return wandb.init(
        project=config.project,
        name=config.name,
        mode=config.mode,
        id=run_id,
        resume="allow",
        dir=output_dir,
        config=run_config,
    )
