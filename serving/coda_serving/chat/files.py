"""Files that get a new content."""

import shutil
from pathlib import Path

from CoDALanguageModel.run_files import arriving


def replace(path: Path, content: bytes) -> None:
    """Put another content into a file that is there, whole or not at all; a link to it stays one.

    Raises:
        OSError: it cannot be written, and is as it was.
    """
    path = path.resolve()
    with arriving(path) as new:
        new.touch(0o600)
        new.write_bytes(content)
        shutil.copymode(path, new)
