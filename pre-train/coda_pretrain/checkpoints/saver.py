"""Saving a checkpoint: tensors are copied to the host at the step, files are written while training goes on.

A save that fails leaves nothing that looks valid and is reported, at the latest at the end of the run: every process
learns of it, none goes on in the belief that the state is safe. Not here: what a checkpoint holds and how one is
verified (`checkpoint`).
"""

import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from CoDALanguageModel.errors import UserError

from ..devices.backend import Planners
from ..places import Place, files_below, remove_tree, sha256_of, size_of, write_durably
from .checkpoint import (
    FORMAT_VERSION,
    MARKER,
    CheckpointError,
    TrainState,
    cause_of,
    committed_checkpoints,
    random_state,
    remove_old_checkpoints,
    step_folder,
    tensor_reader,
)
from .resume_check import DATA_NAME

logger = logging.getLogger(__name__)

SEEN_WITHIN_S = 60.0
"""How long a process waits at the start for what the others wrote into the checkpoints folder."""


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in the memory of the host."""

    step: int
    tensors: dict[str, Any]
    """This process's part of each tensor."""

    texts: dict[str, str]
    """The other files by name."""


def snapshot(
    tensors: Mapping[str, Tensor],
    state: TrainState,
    *,
    run_config: str,
    model_config: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    backend: Planners,
) -> Snapshot:
    """Copy everything that a checkpoint holds.

    Args:
        tensors: flat names to tensors of the backend.
        state: numbers.
        run_config: the resolved run configuration, as YAML.
        model_config: `CoDAConfig.to_dict()`.
        data: what `resume_check.DATA_NAME` holds.
        backend: where the tensors are.
    """
    texts = {
        "state.json": json.dumps(asdict(state), indent=1),
        "rng.json": json.dumps(random_state()),
        "config.yaml": run_config,
        "model_config.json": json.dumps(model_config, indent=1),
    }
    if data is not None:
        texts[DATA_NAME] = json.dumps(data, indent=1)
    return Snapshot(state.step, backend.host_copy(tensors), texts)


def write_checkpoint(folder: Place, content: Snapshot, *, backend: Planners, keep: int | None = None) -> Place:
    """Write a snapshot into `folder`, commit it, and remove surplus checkpoints. All processes call this together.

    Args:
        folder: the checkpoints folder of the run.
        content: this process's snapshot.
        backend: supplies the planner and the group of processes.
        keep: newest checkpoints to keep; None keeps all.

    Raises:
        CheckpointError: on every process, when one of them could not write. What was written is removed and earlier
            checkpoints stay valid.
    """
    path, group = step_folder(folder, content.step), backend.saving_group()
    try:
        with _agreed(group):
            if backend.is_main:
                if path.exists():  # unfinished, or of a course of the run that was left
                    (path / MARKER).unlink(missing_ok=True)
                    remove_tree(path)
                path.mkdir(parents=True)
        dcp.save(
            content.tensors,
            storage_writer=_tensor_writer(path),
            planner=backend.save_planner(),
            process_group=group,
            no_dist=group is None,
        )
        with _agreed(group):
            if backend.is_main:
                _commit(path, content)
    except (OSError, RuntimeError, CheckpointException) as error:  # CheckpointException is no Exception
        if backend.is_main:
            _discard(path)
        committed = committed_checkpoints(folder)
        kept = f"the newest valid one is {committed[-1]}" if committed else "the run has no valid one"
        raise CheckpointError(f"the checkpoint {path} could not be saved: {cause_of(error)}; {kept}") from error
    if backend.is_main:
        try:
            remove_old_checkpoints(folder, keep)
        except OSError as error:
            raise CheckpointError(f"{path} is saved, but older checkpoints could not be removed: {error}") from error
    return path


class Saver:
    """Writes snapshots of a run in a thread, one after the other."""

    def __init__(self, folder: Place, *, backend: Planners, keep: int | None, asynchronous: bool) -> None:
        """Args are those of `write_checkpoint`; `asynchronous` lets training go on during a save."""
        self._folder, self._backend, self._keep, self._asynchronous = folder, backend, keep, asynchronous
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._running: Future[Place] | None = None

    @property
    def failed(self) -> bool:
        """Whether the save that was started last has ended in an error on this process."""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    def save(self, take: Callable[[], Snapshot]) -> None:
        """Save the snapshot that `take()` gives. Waits for the save before, and for this one if not asynchronous.

        Raises:
            CheckpointError: the save before, or this one if it was waited for, could not be written.
        """
        asked = time.perf_counter()
        self.wait()
        started = time.perf_counter()
        if started - asked > 1.0:
            logger.warning(
                "training waited %.1f s for the checkpoint before: a save takes longer than checkpoint.every steps",
                started - asked,
            )
        content = take()
        copied = time.perf_counter()
        self._running = self._thread.submit(self._write, content, copied - started)
        if not self._asynchronous:
            self.wait()

    def _write(self, content: Snapshot, copy_seconds: float) -> Place:
        started = time.perf_counter()
        path = write_checkpoint(self._folder, content, backend=self._backend, keep=self._keep)
        seconds = time.perf_counter() - started
        logger.info("saved %s: copied in %.2f s, written in %.1f s", path, copy_seconds, seconds)
        return path

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            CheckpointError: the last save could not be written; raised once.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Let a save end. An error that nobody waited for is logged."""
        try:
            self.wait()
        except CheckpointError as error:
            logger.error("%s", error)
        self._thread.shutdown()


def check_folder(folder: Place, *, backend: Planners) -> None:
    """Find out before anything is trained whether checkpoints can be saved: all processes call this together.

    Args:
        folder: the checkpoints folder of the run; made if it is not there.
        backend: supplies the group of processes.

    Raises:
        UserError: on every process, when one of them cannot write into the folder, or does not see what another
            one wrote there.
    """
    group = backend.saving_group()
    tokens = [secrets.token_hex(8)]
    own = folder / f".seen-{tokens[0]}"
    if group is not None:
        tokens = [None] * dist.get_world_size(group)
        dist.all_gather_object(tokens, own.name.removeprefix(".seen-"), group)
    try:
        with _agreed(group), _as_os_error():
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(own, "written to see whether every process can")
        with _agreed(group), _as_os_error():
            unseen = _wait_for([folder / f".seen-{token}" for token in tokens])
            if unseen:
                ranks = ", ".join(str(rank) for rank, token in enumerate(tokens) if folder / f".seen-{token}" in unseen)
                raise OSError(f"what process {ranks} wrote there cannot be seen by process {backend.rank}")
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"checkpoint.folder must be a folder or URL that every process can write into and that all of them share; "
            f"{folder}: {cause_of(error)}"
        ) from error
    finally:
        try:
            own.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s could not be removed: %s", own, error)


def _wait_for(files: list[Place]) -> list[Place]:
    """The files that do not appear in time: mounts of a store may show what others wrote some seconds late."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while (unseen := [file for file in files if not file.exists()]) and time.monotonic() < deadline:
        time.sleep(0.5)
    return unseen


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What the client of a store raises, which is of its own kinds, as an `OSError` with the same words."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _agreed(group: ProcessGroup | None) -> Iterator[None]:
    """Runs a block on every process of the group; an error of one becomes an error of all."""
    fault: OSError | RuntimeError | None = None
    try:
        yield
    except (OSError, RuntimeError) as error:
        fault = error
    if group is not None:
        faults: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(faults, None if fault is None else cause_of(fault), group)
        others = [f"process {rank}: {text}" for rank, text in enumerate(faults) if text is not None]
        if others and fault is None:
            raise RuntimeError("; ".join(others))
    if fault is not None:
        raise fault


def _tensor_writer(path: Place) -> dcp.FileSystemWriter:
    tensors = path / "tensors"
    if isinstance(tensors, Path):
        return dcp.FileSystemWriter(tensors, per_thread_copy_ahead=0)
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    # A store has taken a file when its stream is closed; there is no descriptor to synchronise.
    return FsspecWriter(str(tensors), per_thread_copy_ahead=0, sync_files=False)


def _commit(path: Place, content: Snapshot) -> None:
    for name, text in content.texts.items():
        write_durably(path / name, text)
    found = sorted(files_below(path).items())
    stored = tensor_reader(path).read_metadata().storage_data.values()
    absent = {f"tensors/{entry.relative_path}" for entry in stored} - dict(found).keys()
    if absent:
        raise OSError(
            f"{', '.join(sorted(absent))} of other processes cannot be seen from here: checkpoint.folder must be a "
            "folder or URL that all machines share"
        )
    listed = {name: {"size": size_of(file), "sha256": sha256_of(file)} for name, file in found}
    marker = {"version": FORMAT_VERSION, "step": content.step, "files": listed}
    write_durably(path / MARKER, json.dumps(marker, indent=1))


def _discard(path: Place) -> None:
    """Remove what a failed save has written, as far as that is possible."""
    try:
        (path / MARKER).unlink(missing_ok=True)
        remove_tree(path)
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error)
