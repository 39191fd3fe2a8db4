"""Places: a local folder as a ``pathlib.Path``, anything else (gs://, s3://, memory://, ...) through fsspec.

Both kinds answer the same few questions, so that what writes and reads checkpoints and shards does not ask which one it
has. A package that serves one kind of URL (gcsfs for gs://) is imported only when such a URL is opened. Not here: what
lies in the files.
"""

import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from functools import total_ordering
from pathlib import Path
from typing import IO, Any, Self

from CoDALanguageModel.errors import UserError

CHUNK_BYTES = 1 << 24  # of a file that is read through to be hashed or copied


@total_ordering
class RemotePath:
    """A file or folder behind an fsspec URL, with the methods of ``pathlib.Path`` that this package uses."""

    def __init__(self, url: str) -> None:
        """Find the file system of ``url``.

        Raises:
            UserError: nothing serves the URL's protocol, or its package is not installed.
        """
        import fsspec

        self.url = url.rstrip("/")
        try:
            # No listings cache: other machines write where this one reads.
            self.fs, self.key = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            raise UserError(
                f"{url} needs a package that is not installed ({error}); gs:// is served by gcsfs, s3:// by s3fs"
            ) from error
        except ValueError as error:
            raise UserError(f"{url} is no folder and no URL that fsspec knows: {error}") from error

    @property
    def name(self) -> str:
        """The part after the last slash."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def suffix(self) -> str:
        """The name's last dot and what follows it."""
        return os.path.splitext(self.name)[1]

    @property
    def parent(self) -> Self:
        """The folder that holds this."""
        return type(self)(self.url.rsplit("/", 1)[0])

    def with_name(self, name: str) -> Self:
        """The same place under another name."""
        return self.parent / name

    def is_file(self) -> bool:
        """Whether there is a file."""
        return self.fs.isfile(self.key)

    def is_dir(self) -> bool:
        """Whether there is a folder; on an object store, whether anything lies below."""
        return self.fs.isdir(self.key)

    def exists(self) -> bool:
        """Whether there is anything."""
        return self.fs.exists(self.key)

    def iterdir(self) -> Iterator[Self]:
        """What lies in the folder."""
        for key in self.fs.ls(self.key, detail=False):
            name = key.rstrip("/").rsplit("/", 1)[-1]
            if key.rstrip("/") != self.key.rstrip("/"):  # some stores list the folder itself
                yield self / name

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Make the folder, which object stores do not need."""
        self.fs.makedirs(self.key, exist_ok=exist_ok)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        try:
            self.fs.rm_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def open(self, mode: str = "r", encoding: str | None = None) -> IO[Any]:
        """Open the file."""
        if "b" in mode:
            return self.fs.open(self.key, mode)
        return io.TextIOWrapper(self.fs.open(self.key, mode + "b"), encoding=encoding)

    def read_bytes(self) -> bytes:
        """All of the file."""
        return self.fs.cat_file(self.key)

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of the file."""
        return self.read_bytes().decode(encoding)

    def __truediv__(self, name: str) -> Self:
        return type(self)(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __lt__(self, other: Self) -> bool:
        return self.url < other.url

    def __hash__(self) -> int:
        return hash(self.url)


Place = Path | RemotePath


def is_url(text: str) -> bool:
    """Whether a setting names a place through fsspec rather than a local one."""
    return "://" in text


def place_of(text: str | Place) -> Place:
    """The place that a setting names: a ``RemotePath`` for a URL, else a ``Path``.

    Raises:
        UserError: the URL cannot be served.
    """
    if isinstance(text, str):
        return RemotePath(text) if is_url(text) else Path(text)
    return text


def files_below(folder: Place) -> dict[str, Place]:
    """Every file below ``folder`` by its path relative to it, sorted."""
    if isinstance(folder, Path):
        return {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    start = len(folder.key.rstrip("/")) + 1
    names = sorted(key[start:] for key in folder.fs.find(folder.key))
    return {name: folder / name for name in names}


def sizes_below(folder: Place) -> dict[str, int]:
    """Bytes of every file below ``folder`` by its path relative to it; one request where it lies in a store."""
    if isinstance(folder, Path):
        return {name: size_of(file) for name, file in files_below(folder).items()}
    start = len(folder.key.rstrip("/")) + 1
    return {key[start:]: int(info["size"]) for key, info in folder.fs.find(folder.key, detail=True).items()}


def size_of(file: Place) -> int:
    """Bytes of a file."""
    return file.stat().st_size if isinstance(file, Path) else int(file.fs.size(file.key))


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
    """Write ``text`` and have it on the device, or accepted by the store, before returning."""
    if isinstance(file, RemotePath):
        file.fs.pipe_file(file.key, text.encode("utf-8"))
        return
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def remove_tree(folder: Place) -> None:
    """Remove a folder and all below it. Nothing happens if it is not there.

    Raises:
        OSError: something could not be removed.
    """
    if isinstance(folder, Path):
        if folder.exists():
            shutil.rmtree(folder)
    elif folder.exists():
        folder.fs.rm(folder.key, recursive=True)


def move_tree(folder: Place, target: Place, *, last: str) -> None:
    """Move a folder. Where that takes more than one operation, the file ``last`` leaves first and arrives last.

    Raises:
        OSError: something could not be moved.
    """
    if isinstance(folder, Path):
        assert isinstance(target, Path), "both places are of one kind"
        folder.rename(target)
        return
    content = (folder / last).read_bytes()
    (folder / last).unlink()
    folder.fs.mv(folder.key, target.key, recursive=True)
    target.fs.pipe_file((target / last).key, content)


def copy_to_local(file: Place, target: Path) -> str:
    """Copy a file to ``target``, which appears only when it is whole; give its SHA-256.

    Raises:
        OSError: it could not be read or written.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    digest = hashlib.sha256()
    try:
        with file.open("rb") as source, temporary.open("wb") as copy:
            while block := source.read(CHUNK_BYTES):
                digest.update(block)
                copy.write(block)
            copy.flush()
            os.fsync(copy.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest()
