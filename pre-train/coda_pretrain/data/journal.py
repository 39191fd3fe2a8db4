"""What a preparation has finished: taking up a killed run, refusing to mix two, removing what one left.

Not here: the work itself (`prepare`).
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.run_files import read_rows, write_whole

from .shards import MANIFEST_NAME, ShardRecord, shard_is_intact

logger = logging.getLogger(__name__)

PROGRESS_NAME = "progress.jsonl"


@contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Hold `output` against a second preparation.

    Raises:
        UserError: another process holds it.
    """
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--output {output}: another preparation is writing there") from error
        yield


class Progress:
    """`progress.jsonl`: a header that identifies the preparation, then one line for each finished piece."""

    def __init__(self, output: Path, header: dict[str, Any]) -> None:
        self.output, self.path, self.header = output, output / PROGRESS_NAME, header
        self.finished: dict[int, dict[str, Any]] = {}

    def load(self) -> None:
        """Read the finished pieces and keep those whose shards are intact.

        Raises:
            UserError: the file belongs to another preparation, or is damaged.
        """
        if not self.path.exists():
            return
        lines = read_rows(self.path)
        if lines and lines[0] != self.header:
            differing = sorted(key for key in self.header if lines[0].get(key) != self.header[key])
            raise UserError(
                f"--output {self.output} holds shards of another preparation (different: {', '.join(differing)}); "
                "choose another folder, or --overwrite to remove them"
            )
        for line in lines[1:]:
            if self._is_intact(line):
                self.finished[line["piece"]] = line
            else:
                logger.warning("a shard of piece %d is missing or damaged; that piece is done again", line["piece"])

    def _is_intact(self, line: dict[str, Any]) -> bool:
        folders = {"train": self.output, "validation": self.output / "validation"}
        return all(shard_is_intact(folders[split], ShardRecord(**shard)) for split, shard in line["shards"].items())

    def rewrite(self) -> None:
        """Write header and finished pieces afresh, which also drops a torn last line."""
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in [self.header, *self.finished.values()]))

    def add(self, line: dict[str, Any]) -> None:
        """Commit one finished piece."""
        self.finished[line["piece"]] = line
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def remove_preparation(output: Path) -> None:
    """Remove the files that a preparation writes to `output`, and nothing else."""
    for folder, split in ((output, "train"), (output / "validation", "validation")):
        for pattern in (f"{split}-*.bin", f"{split}-*.ends", f".{split}-*.tmp", MANIFEST_NAME, PROGRESS_NAME):
            for path in folder.glob(pattern):
                path.unlink()
