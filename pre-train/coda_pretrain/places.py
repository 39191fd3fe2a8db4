"""Places: a local folder as a `pathlib.Path`, anything else (gs://, s3://, memory://, ...) as a `UPath`.

Both kinds answer the same few questions, so that what writes and reads checkpoints and shards does not ask which one it
has. What serves URLs (universal-pathlib, and a package for one kind of them: gcsfs for gs://) is imported only when one
is opened. Not here: what lies in the files.
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Union

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.run_files import arriving, write_whole

if TYPE_CHECKING:
    from upath import UPath

CHUNK_BYTES = 1 << 24  # of a file that is read through to be hashed or copied

Place = Union[Path, "UPath"]


def is_url(text: str) -> bool:
    """Whether a setting names a place through fsspec rather than a local one."""
    return "://" in text


def place_of(text: str | Place) -> Place:
    """The place that a setting names: a `UPath` for a URL, else a `Path`.

    Raises:
        UserError: nothing serves the URL's protocol, or its package is not installed.
    """
    if not isinstance(text, str):
        return text
    if not is_url(text):
        return Path(text)
    try:
        from upath import UPath

        place = UPath(text.rstrip("/"), use_listings_cache=False)  # other machines write where this one reads
        place.fs  # noqa: B018 (looks for the package)
    except ImportError as error:
        raise UserError(
            f"{text} needs a package that is not installed ({error}); any URL needs universal-pathlib, gs:// is "
            "served by gcsfs, s3:// by s3fs"
        ) from error
    except ValueError as error:
        raise UserError(f"{text} is no folder and no URL that fsspec knows: {error}") from error
    return place


def files_below(folder: Place) -> dict[str, Place]:
    """Every file below `folder` by its path relative to it, sorted."""
    if isinstance(folder, Path):
        return {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    start = len(folder.path.rstrip("/")) + 1
    names = sorted(key[start:] for key in folder.fs.find(folder.path))
    return {name: folder / name for name in names}


def sizes_below(folder: Place) -> dict[str, int]:
    """Bytes of every file below `folder` by its path relative to it; one request where it lies in a store."""
    if isinstance(folder, Path):
        return {name: size_of(file) for name, file in files_below(folder).items()}
    start = len(folder.path.rstrip("/")) + 1
    return {key[start:]: int(info["size"]) for key, info in folder.fs.find(folder.path, detail=True).items()}


def size_of(file: Place) -> int:
    """Bytes of a file."""
    return file.stat().st_size if isinstance(file, Path) else int(file.fs.size(file.path))


def sha256_of(file: Place) -> str:
    """Hexadecimal SHA-256 of a file."""
    with file.open("rb") as stream:
        if isinstance(file, Path):
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        while block := stream.read(CHUNK_BYTES):
            digest.update(block)
        return digest.hexdigest()


def write_durably(file: Place, text: str) -> None:
    """Write `text` and have it on the device, or accepted by the store, before returning."""
    if isinstance(file, Path):
        write_whole(file, text)
    else:
        file.fs.pipe_file(file.path, text.encode("utf-8"))


def remove_tree(folder: Place) -> None:
    """Remove a folder and all below it. Nothing happens if it is not there.

    Raises:
        OSError: something could not be removed.
    """
    if isinstance(folder, Path):
        if folder.exists():
            shutil.rmtree(folder)
    elif folder.exists():
        folder.fs.rm(folder.path, recursive=True)


def move_tree(folder: Place, target: Place, *, last: str) -> None:
    """Move a folder. Where that takes more than one operation, the file `last` leaves first and arrives last.

    Raises:
        OSError: something could not be moved.
    """
    if isinstance(folder, Path):
        assert isinstance(target, Path), "both places are of one kind"
        folder.rename(target)
        return
    content = (folder / last).read_bytes()
    (folder / last).unlink()
    folder.fs.mv(folder.path, target.path, recursive=True)
    target.fs.pipe_file((target / last).path, content)


def copy_to_local(file: Place, target: Path) -> str:
    """Copy a file to `target`, which appears only when it is whole; give its SHA-256.

    Raises:
        OSError: it could not be read or written.
    """
    digest = hashlib.sha256()
    with arriving(target) as temporary, file.open("rb") as source, temporary.open("wb") as copy:
        while block := source.read(CHUNK_BYTES):
            digest.update(block)
            copy.write(block)
        copy.flush()
        os.fsync(copy.fileno())
    return digest.hexdigest()
