"""What every stage is given, and where the stages leave folders for each other."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.section import emit

from CoDALanguageModel.errors import UserError

BATCH_SIZE = 8
"""Answers that are made together, on both roads."""

NEW_TOKENS = 384
"""Longest answer of a benchmark."""

CHUNK = 16
"""Problems that one road answers before it is the other's turn."""


@dataclass(frozen=True)
class Task:
    """A stage at work on a model."""

    model: Path
    """As given: a GGUF file or a Hugging Face folder."""

    work: Path
    """Folder of all stages of the model."""

    limit: int | None
    """Problems of each benchmark; None is all."""

    key: str
    """Hash of the model's files."""

    deadline: float = float("inf")
    """Of `time.monotonic`; the stage is killed shortly after it."""

    @property
    def source(self) -> Path:
        """The model as a float32 folder of transformers' own class."""
        return self._made("source", self.work / "source")

    def converted(self, dtype: str) -> Path:
        """The model as a CoDA folder that attends by blocks of one token."""
        return self._made("conversion", self.work / f"coda-{dtype}")

    @staticmethod
    def _made(stage: str, folder: Path) -> Path:
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is not there: the stage {stage} makes it")
        return folder


def say(**facts: Any) -> None:
    """Hand a measurement on; one whose `_id` is that of an earlier one takes its place."""
    emit(facts)


@contextmanager
def timed(facts: dict[str, Any]) -> Iterator[None]:
    """Add the seconds of the block by the clock, and of processor time of all threads, to the facts."""
    wall, used = time.monotonic(), time.process_time()
    yield
    facts["seconds"] = round(time.monotonic() - wall, 2)
    facts["cpu_seconds"] = round(time.process_time() - used, 2)


def load() -> float:
    """Processes that want to run on this machine, the mean of the last minute."""
    return round(os.getloadavg()[0], 1)
