"""Files that get a new content."""

import os
import shutil
import tempfile
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Put another content into a file that is there, whole or not at all; a link to it stays one.

    Raises:
        OSError: it cannot be written, and is as it was.
    """
    path = path.resolve()
    new = tempfile.NamedTemporaryFile(dir=path.parent, delete=False)  # noqa: SIM115
    try:
        with new:
            new.write(content)
        shutil.copymode(path, new.name)
        os.replace(new.name, path)
    except BaseException:
        os.unlink(new.name)
        raise
