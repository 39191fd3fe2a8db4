"""Weights & Biases and TensorBoard: optional places for metrics rows, imported only when `metrics` asks for them."""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from CoDALanguageModel.errors import UserError

from ..config import RunConfig, WandbConfig
from ..plain_data import to_plain
from .metrics import Tracker


def check_trackers(config: RunConfig) -> None:
    """Find the packages of the trackers that are asked for.

    Raises:
        UserError: one is not installed.
    """
    metrics = config.metrics
    for name, wanted in (("wandb", metrics.wandb is not None), ("tensorboard", metrics.tensorboard)):
        if wanted and importlib.util.find_spec(name) is None:
            raise UserError(f"metrics.{name} needs the package {name}, which is not installed; leave it out without")


def start_trackers(config: RunConfig, *, finished_steps: int) -> list[Tracker]:
    """The trackers that `metrics` names, for a run of which `finished_steps` are done."""
    trackers: list[Tracker] = []
    if config.metrics.wandb is not None:
        trackers.append(_wandb_run(config.metrics.wandb, config.output_dir, to_plain(config)))
    if config.metrics.tensorboard:
        trackers.append(TensorBoardTracker(Path(config.output_dir), finished_steps=finished_steps))
    return trackers


def _wandb_run(config: WandbConfig, output_dir: str, run_config: dict[str, Any]) -> Any:
    """A W&B run that a resumed process continues: its id comes from the run folder."""
    import wandb

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


class TensorBoardTracker:
    """Event files in `tensorboard` of the run folder; a resumed run replaces the rows that it makes again."""

    def __init__(self, output_dir: Path, *, finished_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=finished_steps + 1)

    def log(self, row: dict[str, Any], step: int) -> None:
        """Write the numbers of a row."""
        for name, value in row.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        """Close the file."""
        self._writer.close()
