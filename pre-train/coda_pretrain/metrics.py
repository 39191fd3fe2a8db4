"""``metrics.jsonl`` and what a person sees while the run goes on. Only the main process makes these."""

import json
import logging
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


class MetricsFile:
    """One JSON object a line, in order of steps; a resumed run replaces the rows that it makes again."""

    def __init__(self, path: Path, *, finished_steps: int) -> None:
        """Open ``path`` for appending, without rows after ``finished_steps`` and without a torn last line."""
        self.path = path
        if path.exists():
            kept = [json.dumps(row) for row in read_rows(path) if row["step"] <= finished_steps]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row and hand it to the operating system."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, up to the first line that was not written completely."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s holds a line that was not written completely; rows from there on are dropped", path)
            break
    return rows


class Reporter:
    """Rows to the file, to W&B when asked, and to the terminal: a progress bar, or log lines where there is none."""

    def __init__(self, path: Path, *, finished_steps: int, num_steps: int, tracker: Any = None) -> None:
        """Open the file.

        Args:
            path: the metrics file.
            finished_steps: steps done before this process.
            num_steps: steps of the whole run.
            tracker: an object with ``log(row, step=...)`` and ``finish()``, such as a W&B run.
        """
        self._file = MetricsFile(path, finished_steps=finished_steps)
        self._tracker = tracker
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
        """Note that ``step`` steps are finished."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def row(self, row: dict[str, Any]) -> None:
        """Report a row of numbers; it has a ``step``."""
        self._file.write(row)
        if self._tracker is not None:
            self._tracker.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
        summary = "  ".join(f"{name} {row[key]:.4g}" for key, name in SHOWN.items() if key in row)
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
        if self._tracker is not None:
            self._tracker.finish()


SHOWN = {"loss": "loss", "eval_loss": "eval loss", "learning_rate": "rate", "tokens_per_s": "tokens/s"}
