"""What the commands show: numbers and tables in Markdown, and the files that `--output` names."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coda_eval.journal import COMMAND, FILES, HASHES
from coda_eval.records import FILE
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.run_files import write_whole


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown, numbers on the right; what a cell holds cannot end it, nor be a tag of HTML."""

    def line(cells: Sequence[Any]) -> str:
        texts = (" ".join(str(cell).splitlines()).replace("|", "\\|").replace("<", "&lt;") for cell in cells)
        return "| " + " | ".join(texts) + " |"

    rule = [":---" if n == 0 else "---:" for n in range(len(header))]
    return "\n".join([line(header), line(rule), *map(line, rows)]) + "\n"


def shown(score: float, bounded: bool) -> str:
    """A score as a share in percent, or as it is where it is none."""
    return f"{100 * score:.1f} %" if bounded else f"{score:.4f}"


def shown_interval(interval: Sequence[float], bounded: bool) -> str:
    """Two scores as an interval."""
    low, high = (shown(bound, bounded) for bound in interval)
    return f"{low.removesuffix(' %')} to {high}"


def write_output(path: Path, text: str) -> None:
    """Write what a command was asked to write, whole; its folder is made.

    Raises:
        UserError: a run keeps what it must not lose there, or nothing can be written.
    """
    if os.path.exists(path) and any(map(path.match, (FILE, FILES, COMMAND, HASHES))):
        raise UserError(f"--output {str(path)!r} is a file that a run keeps: name another")
    # A name that is no UTF-8 has halves of surrogate pairs in Python.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except (OSError, ValueError) as error:  # a name that cannot be one is a ValueError
        raise UserError(f"--output {str(path)!r} cannot be written: {error}") from error
