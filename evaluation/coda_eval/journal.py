"""The journal of a run: every answer as it is made, under a key of all that it depends on.

Each rank appends to its own `journal_rank*.jsonl` in the run's folder; a run that goes on reads those of all ranks. A
line is an answer, settings that answers name by their digest, or a reference by which a later command takes an answer
of an earlier one. Lines reach the kernel before the next answer is made, so that no answer is lost when the process is
killed; the disk is waited for every few seconds only, since a machine that goes down costs no more than these.

Not here: what a key is made of for a request (`session.py`), what became of an answer (`records.py`).
"""

import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.run_files import read_json, whole_lines, write_whole

FILES = "journal_rank*.jsonl"
"""Pattern of the names of the journals in a run's folder."""

COMMAND = "command.json"
"""Name of the file that says what the last command in a folder was asked to do, and with which model."""

HASHES = "hashes.json"
"""Name of the file that keeps the hashes of weight files, by path, size and time of change."""

_SYNC_S = 5.0  # between two waits for the disk

_NUMBER = int | float | None
_SETTINGS = {"settings": str, "resolved": dict}
_TAKEN = {"run": str, "key": str}
_LINE = {"task": str, "task_id": object, "slot": str, "settings": str, "code": str, "prompt": str}
_ANSWER = {"answer": str, "seed": int | None, "cost": dict | None}
_ANSWER |= dict.fromkeys(("new_tokens", "forwards", "generation_s"), _NUMBER)
_LIKELIHOOD = {"nats": int | float, "stderr": _NUMBER, "is_greedy": bool | None}
"""What lines hold that is read: settings, a reference or an answer, of it all, and a text or a likelihood."""


def digest(value: Any) -> str:
    """Hash of anything that JSON can say, 24 hexadecimal digits; what it cannot say counts as its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _check(row: Any) -> None:
    """Raise KeyError or TypeError where a line that was read does not hold what it must."""
    kinds = _SETTINGS if "resolved" in row else _TAKEN
    if "resolved" not in row and "settings" in row:
        kinds = _TAKEN | _LINE | (_ANSWER if "answer" in row else _LIKELIHOOD)
    for name, kind in kinds.items():
        if not isinstance(row[name], kind):
            raise TypeError(f"{name}: {row[name]!r:.80}")


class Nats(float):
    """A log-likelihood that remembers the standard error of its estimate; None where it is not known."""

    stderr: float | None = None

    @classmethod
    def of(cls, nats: float, stderr: float | None) -> "Nats":
        """A value and its error."""
        value = cls(nats)
        value.stderr = stderr
        return value

    def __add__(self, other: float) -> "Nats":  # lm-eval sums over the windows of a long text
        errors = [self.stderr, getattr(other, "stderr", 0.0)]
        return Nats.of(float(self) + float(other), None if None in errors else math.hypot(*errors))

    __radd__ = __add__


class Journal:
    """The answers of all ranks at the start, and a file to append this rank's to.

    Args:
        folder: of the run.
        rank: of this process.
        resume: whether the files that are there are read and gone on with; else there must be none.

    Raises:
        UserError: a file is broken elsewhere than at its end, or another process writes to this rank's.
    """

    def __init__(self, folder: Path, rank: int = 0, *, resume: bool = False) -> None:
        self.folder, self.path = folder, folder / f"journal_rank{rank}.jsonl"
        self.answers: dict[str, dict[str, Any]] = {}
        """Lines of answers by their key."""

        self.settings: dict[str, dict[str, Any]] = {}
        """Settings by their digest."""

        self.taken: dict[str, set[str]] = {}
        """Keys of the answers that each command made or took, by its `Session.name`."""

        self.made = self.used = 0
        self._known: set[str] = set()  # digests of settings in this rank's file
        self._file: int | None = None
        self._synced = time.monotonic()
        self._resume = resume
        if resume and self.path.exists():
            self._open()
        for path in sorted(folder.glob(FILES)) if resume else ():
            end = self._read(path)
            if path == self.path and end < path.stat().st_size:
                os.ftruncate(self._file, end)
        self.found = len(self.answers)

    def _open(self) -> None:
        # A command that is no resumption makes the file: a second one ends here instead of mixing its answers in.
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | (0 if self._resume else os.O_EXCL)
        try:
            self._file = os.open(self.path, flags, 0o666)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (FileExistsError, BlockingIOError) as error:
            raise UserError(f"another command writes to {self.path}: give it a folder of its own") from error
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error}") from error

    def _read(self, path: Path) -> int:
        """Read a file, and return where its last whole line ends."""
        end = 0
        for number, row, behind in whole_lines(path):
            try:
                _check(row)
                self._take(row)
            except (KeyError, TypeError) as error:
                raise UserError(
                    f"{path}: line {number} is no line of a journal ({type(error).__name__}: {error}); mend it, or "
                    "remove it"
                ) from error
            end = behind
        return end

    def _take(self, row: dict[str, Any]) -> None:
        if "resolved" in row:
            self.settings[row["settings"]] = row["resolved"]
            return
        if "settings" in row:
            self.answers[row["key"]] = row
        self.taken.setdefault(row["run"], set()).add(row["key"])

    def write(self, rows: Sequence[dict[str, Any]], settings: Mapping[str, dict[str, Any]]) -> None:
        """Append answers and references, before them the settings that the file does not have yet, by their digests.

        Raises:
            OSError: the file cannot be written; it then ends as it did.
        """
        if self._file is None:
            self._open()
        fresh = [{"settings": name, "resolved": settings[name]} for name in settings if name not in self._known]
        data = "".join(json.dumps(row, default=str) + "\n" for row in [*fresh, *rows]).encode("ascii")
        start, left = os.fstat(self._file).st_size, memoryview(data)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            os.ftruncate(self._file, start)
            raise
        self._known |= settings.keys()
        for row in [*fresh, *rows]:
            self._take(row)
        self.made += sum("settings" in row for row in rows)
        if time.monotonic() - self._synced > _SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        if self._file is not None:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def close(self) -> None:
        """Leave the file, whole and on the disk."""
        self.sync()
        if self._file is not None:
            os.close(self._file)
            self._file = None


def hash_weights(arguments: Mapping[str, Any], folder: Path | None = None) -> str:
    """Hash of the files that a model is loaded from: weights, configuration, adapters, and its code where that runs.

    Args:
        arguments: those of lm-eval's Hugging Face models: `pretrained`, `revision`, `peft` and so on.
        folder: of a run, which keeps the hashes of files.
    """
    from CoDALanguageModel.weight_files import weight_files  # and torch, which the model has brought

    revision = arguments.get("revision") or "main"
    files: list[Path] = []
    for name in ("pretrained", "peft", "delta"):
        if arguments.get(name):
            root = _model_folder(str(arguments[name]), revision, str(arguments.get("subfolder") or ""))
            weights = [root / arguments["gguf_file"]] if arguments.get("gguf_file") else weight_files(root)
            files += weights or [
                path for kind in ("safetensors", "bin", "pt") for path in sorted(root.glob(f"*.{kind}"))
            ]
            files += [root / file for file in ("config.json", "adapter_config.json") if (root / file).is_file()]
            files += sorted(root.glob("*.py")) if arguments.get("trust_remote_code") else []
    return digest([[path.name, of_file] for path, of_file in zip(files, _hash_files(files, folder), strict=True)])


def _model_folder(name: str, revision: str, subfolder: str) -> Path:
    """A folder, or where the files of a Hub name lie after it was loaded."""
    if os.path.isdir(name):
        return Path(name, subfolder)
    from transformers.utils import cached_file

    for file in ("config.json", "adapter_config.json"):
        path = cached_file(
            name,
            file,
            revision=revision,
            subfolder=subfolder,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
        )
        if path is not None:
            return Path(path).parent
    raise UserError(f"{name!r} has no config.json, so that its weights cannot be found")


def _read_hashes(store: Path) -> dict[str, list[Any]]:
    """The hashes of files that a run's folder keeps: [size, time of change, hash] by path."""
    remedy = "remove it, and the files are hashed again"
    known = read_json(store, remedy)
    for path, facts in known.items():
        if not isinstance(facts, list) or [*map(type, facts)] != [int, int, str]:
            raise UserError(f"{store}: {path!r} must have [size, time of change, hash], got {facts!r:.80}; {remedy}")
    return known


def _hash_files(paths: Iterable[Path], folder: Path | None) -> list[str]:
    store = folder / HASHES if folder is not None else None
    known = _read_hashes(store) if store is not None and store.is_file() else {}
    paths = [path.resolve() for path in paths]  # in the Hub's cache, files of the same content are one
    hashes = {}
    for path in dict.fromkeys(paths):
        stat = path.stat()
        facts = [stat.st_size, stat.st_mtime_ns]
        if known.get(str(path), [])[:2] == facts:
            hashes[str(path)] = known[str(path)]
            continue
        with path.open("rb") as file:
            hashes[str(path)] = [*facts, hashlib.file_digest(file, "sha256").hexdigest()]
    if store is not None and any(known.get(path) != facts for path, facts in hashes.items()):
        write_whole(store, json.dumps(known | hashes, indent=1) + "\n")
    return [hashes[str(path)][2] for path in paths]


def hash_tokenizer(tokenizer: Any) -> str:
    """Hash of a tokenizer with its chat template, as it was loaded.

    Raises:
        UserError: there is no room to write it.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # that of a library in Rust has no class of its own
            if not isinstance(error, OSError) and "(os error " not in str(error):
                raise
            raise UserError(
                f"the tokenizer cannot be written to {folder}, to be hashed: {error}; TMPDIR names another place"
            ) from error
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    config = json.loads(files.pop("tokenizer_config.json"))
    for name in ("is_local", "local_files_only", "name_or_path"):  # where it came from
        config.pop(name, None)
    # One of sentencepiece is no text.
    return digest([{name: hashlib.sha256(content).hexdigest() for name, content in files.items()}, config])


@cache
def code_version() -> str:
    """Commit of this checkout, with a mark where its files differ from it; else the version of the package."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(here.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) and (commit := git("rev-parse", "HEAD")):
        return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no", ":/") else commit
    return f"coda-lm {importlib.metadata.version('coda-lm')}"


def known_likelihood(value: Any) -> dict[str, Any]:
    """What the journal keeps of a likelihood: lm-eval's pair, or a number where whole texts are scored.

    One that has no error was computed and not estimated.
    """
    nats, is_greedy = value if isinstance(value, tuple) else (value, None)
    return {"nats": float(nats), "stderr": getattr(nats, "stderr", 0.0), "is_greedy": is_greedy}


def read_likelihood(line: dict[str, Any]) -> Any:
    """The likelihood of a line of the journal, as lm-eval takes it."""
    nats = Nats.of(line["nats"], line["stderr"])
    return nats if line["is_greedy"] is None else (nats, line["is_greedy"])
