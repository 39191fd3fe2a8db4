"""`metrics.jsonl` and what a person sees while the run goes on. Only the main process makes these."""

import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from CoDALanguageModel.run_files import read_rows, write_whole

from ..devices.backend import Backend
from ..devices.chips import CHIPS, chip_of_gpu
from .flops import BlockShape, ModelShape, training_flops, work_of_batch

logger = logging.getLogger(__name__)


class MetricsFile:
    """One JSON object a line, in order of steps; a resumed run replaces the rows that it makes again."""

    def __init__(self, path: Path, *, finished_steps: int) -> None:
        """Open `path` for appending, without rows after `finished_steps` and without a torn last line."""
        self.path = path
        if path.exists():
            kept = [json.dumps(row) for row in read_rows(path) if row["step"] <= finished_steps]
            write_whole(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row and hand it to the operating system."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Tracker(Protocol):
    """A place that rows also go to, such as a W&B run."""

    def log(self, row: dict[str, Any], step: int) -> None:
        """Take the numbers of a row; None where one is not known."""

    def finish(self) -> None:
        """Hear that no row follows."""


class UtilizationMeter:
    """MFU of the steps since the last row: operations a second that training needs, over the peak of all devices."""

    def __init__(self, peak: float | None, shape: ModelShape, step_rows: int) -> None:
        """Start at no steps.

        Args:
            peak: operations a second of all devices together; None where it is not known.
            shape: the model's.
            step_rows: rows that go through the model in a step, over all processes.
        """
        self._peak, self._shape, self._step_rows = peak, shape, step_rows
        self._flops = self._seconds = 0.0

    def add(self, batch: dict[str, np.ndarray], seconds: float, blocks: BlockShape | None = None) -> None:
        """Count a step; this process's rows stand for an equal share of the work of all processes."""
        if self._peak is None:
            return
        work = work_of_batch(batch["segment_ids"], batch["labels"], blocks)
        self._flops += training_flops(self._shape, work) * self._step_rows / len(batch["labels"])
        self._seconds += seconds

    def mfu(self) -> float | None:
        """The share of the peak, in [0, 1]; None where that is not known. Forgets the steps."""
        flops, seconds, self._flops, self._seconds = self._flops, self._seconds, 0.0, 0.0
        return None if self._peak is None or not seconds else flops / seconds / self._peak


def peak_flops(backend: Backend) -> float | None:
    """Dense bf16 operations a second of all devices of a run; None where the configuration and a GPU do not tell."""
    config = backend.config
    chip = config.chip
    if chip is None and config.backend == "cuda":
        chip = chip_of_gpu(torch.cuda.get_device_name())
    tflops = config.peak_tflops
    if tflops is None and chip is not None:
        tflops = CHIPS[chip].peak_tflops
    return None if tflops is None else tflops * 1e12 * math.prod(backend.mesh_shape)


class Reporter:
    """Rows to the file, to trackers, and to the terminal: a progress bar, or log lines where there is none."""

    def __init__(self, path: Path, *, finished_steps: int, num_steps: int, trackers: Sequence[Tracker] = ()) -> None:
        """Open the file.

        Args:
            path: the metrics file.
            finished_steps: steps done before this process.
            num_steps: steps of the whole run.
            trackers: where else rows go.
        """
        self._file = MetricsFile(path, finished_steps=finished_steps)
        self._trackers = trackers
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("step"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[summary]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=num_steps, completed=finished_steps, summary="")
        self._num_steps = num_steps

    def step(self, step: int) -> None:
        """Note that `step` steps are finished."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def row(self, row: dict[str, Any]) -> None:
        """Report a row of numbers; it has a `step`."""
        self._file.write(row)
        for tracker in self._trackers:
            tracker.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
        summary = "  ".join(f"{name} {row[key]:.4g}" for key, name in SHOWN.items() if row.get(key) is not None)
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], summary=summary)
        else:
            logger.info("step %d/%d  %s", row["step"], self._num_steps, summary)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()


SHOWN = {"loss": "loss", "eval_loss": "eval loss", "learning_rate": "rate", "tokens_per_s": "tokens/s", "mfu": "MFU"}
