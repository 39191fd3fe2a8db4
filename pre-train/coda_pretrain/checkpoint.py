"""Checkpoints: written whole or not at all, verified before use, readable by every backend.

``RUN/checkpoints/step-XXXXXXXX/`` holds ``tensors/`` (torch.distributed.checkpoint, one flat mapping of names:
``model.WEIGHT`` and ``optim.WEIGHT.KEY``), ``state.json`` (step, data position and other numbers), ``rng.json``,
``config.yaml`` (the run), ``model_config.json`` (``CoDAConfig``) and, written last, ``COMMITTED.json`` with the size
and hash of every other file. A folder without it is an unfinished save and is never read. Not here: what is in the
tensors, and the export to safetensors (``export``).
"""

import base64
import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from .backends.base import Backend

logger = logging.getLogger(__name__)

MARKER = "COMMITTED.json"
FORMAT_VERSION = 1
STEP_FOLDER = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message says why and which one is still good."""


@dataclass(kw_only=True)
class TrainState:
    """Everything about a run's position that is not a tensor."""

    step: int = 0
    """Finished steps; also the data position, since step s reads samples ``[s * B, (s + 1) * B)``."""

    optimizer_steps: int = 0
    """Updates made: finished steps less the skipped ones."""

    tokens: int = 0
    """Positions that went through the model."""

    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """Time spent in steps."""

    row_steps: int = 0
    """Steps since the last metrics row, and the sums that the next row will report."""

    row_loss: float = 0.0
    row_masked_share: float = 0.0
    row_seconds: float = 0.0
    row_data_wait_s: float = 0.0

    def add_to_row(self, *, loss: float, masked_share: float, seconds: float, data_wait_s: float) -> None:
        """Count one step."""
        self.seconds += seconds
        self.row_steps += 1
        self.row_loss += loss
        self.row_masked_share += masked_share
        self.row_seconds += seconds
        self.row_data_wait_s += data_wait_s

    def start_row(self) -> None:
        """Forget the sums."""
        self.row_steps = 0
        self.row_loss = self.row_masked_share = self.row_seconds = self.row_data_wait_s = 0.0


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies in ``folder``."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a checkpoint folder's name states; None for another name."""
    match = STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else None


def committed_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if step_of(path) is not None and (path / MARKER).is_file()]
    return sorted(found, key=lambda path: step_of(path) or 0)


def fault_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, compared with the sizes and hashes at its commit; None if nothing is."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        files = marker["files"]
    except FileNotFoundError:
        return f"it has no {MARKER}, so its save never finished"
    except (json.JSONDecodeError, KeyError, TypeError):
        return f"its {MARKER} cannot be read"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['size']}"
        if _sha256(file) != expected["sha256"]:
            return f"{name} has another hash than at its commit"
    return None


def intact_checkpoint(path: Path) -> Path:
    """``path``, after verifying it.

    Raises:
        ValueError: it is incomplete or corrupt; the newest intact one beside it is offered.
    """
    fault = fault_of(path)
    if fault is None:
        return path
    others = [other for other in reversed(committed_checkpoints(path.parent)) if other != path]
    good = next((other for other in others if fault_of(other) is None), None)
    offer = (
        f"the newest intact one is {good}: continue from it with checkpoint.resume={good}"
        if good
        else "there is no intact one beside it"
    )
    raise ValueError(f"the checkpoint {path} is corrupt: {fault}; {offer}")


def checkpoint_to_resume(setting: str, folder: Path) -> Path | None:
    """The verified checkpoint that ``checkpoint.resume`` asks for; None to start from the beginning.

    Args:
        setting: ``auto``, ``never`` or the path of a checkpoint.
        folder: the checkpoints folder of the run.

    Raises:
        ValueError: ``never`` in a folder that has checkpoints, no checkpoint at the path, or a corrupt one.
    """
    committed = committed_checkpoints(folder)
    if setting == "never":
        if committed:
            raise ValueError(
                f"checkpoint.resume is 'never', but {folder} holds checkpoints up to {committed[-1].name}: "
                "give another output_dir, or checkpoint.resume=auto to continue"
            )
        return None
    if setting != "auto":
        if not Path(setting).is_dir():
            raise ValueError(f"checkpoint.resume must be auto, never or a checkpoint folder, got {setting!r}")
        return intact_checkpoint(Path(setting))
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if step_of(path) is not None and path not in committed:
            logger.warning("%s was never finished and is ignored", path)
    if not committed:
        return None
    logger.info("resume=auto takes %s", committed[-1])
    return intact_checkpoint(committed[-1])


def save_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    state: TrainState,
    *,
    run_config: str,
    model_config: Mapping[str, Any],
    backend: Backend,
) -> Path:
    """Write the checkpoint of ``state.step`` and commit it. All processes call this together.

    Args:
        folder: the checkpoints folder of the run.
        tensors: flat names to tensors of the backend.
        state: numbers.
        run_config: the resolved run configuration, as YAML.
        model_config: ``CoDAConfig.to_dict()``.
        backend: supplies the planner.

    Raises:
        CheckpointError: anything could not be written; what was written is removed and earlier checkpoints stay valid.
    """
    path = step_folder(folder, state.step)
    try:
        if backend.is_main:
            if path.exists():  # unfinished, or of a course of the run that was left
                (path / MARKER).unlink(missing_ok=True)
                shutil.rmtree(path)
            path.mkdir(parents=True)
        backend.barrier()
        writer = dcp.FileSystemWriter(path / "tensors", per_thread_copy_ahead=0)
        alone = backend.num_processes == 1
        dcp.save(dict(tensors), storage_writer=writer, planner=backend.save_planner(), no_dist=alone)
        if backend.is_main:
            _write(path / "state.json", json.dumps(asdict(state), indent=1))
            _write(path / "rng.json", json.dumps(_random_state()))
            _write(path / "config.yaml", run_config)
            _write(path / "model_config.json", json.dumps(model_config, indent=1))
            files = sorted(file for file in path.rglob("*") if file.is_file())
            listed = {str(f.relative_to(path)): {"size": f.stat().st_size, "sha256": _sha256(f)} for f in files}
            _write(
                path / MARKER, json.dumps({"version": FORMAT_VERSION, "step": state.step, "files": listed}, indent=1)
            )
        backend.barrier()
    except (OSError, RuntimeError, CheckpointException) as error:  # CheckpointException is no Exception
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        committed = committed_checkpoints(folder)
        kept = f"the newest valid one is {committed[-1]}" if committed else "the run has no valid one"
        raise CheckpointError(f"the checkpoint {path} could not be saved: {_cause(error)}; {kept}") from error
    logger.info("saved %s", path)
    return path


def load_checkpoint(path: Path, tensors: Mapping[str, Tensor], *, backend: Backend) -> TrainState:
    """Fill ``tensors`` in place, restore this process's random state and give back the numbers.

    Raises:
        ValueError: the checkpoint does not hold these tensors in these shapes.
    """
    reader = dcp.FileSystemReader(path / "tensors")
    try:
        alone = backend.num_processes == 1
        dcp.load(dict(tensors), storage_reader=reader, planner=backend.load_planner(), no_dist=alone)
    except (RuntimeError, ValueError, KeyError, CheckpointException) as error:
        raise ValueError(
            f"the checkpoint {path} does not fit this run's model and optimizer: {_cause(error)}"
        ) from error
    _set_random_state(json.loads((path / "rng.json").read_text(encoding="utf-8")))
    return TrainState(**json.loads((path / "state.json").read_text(encoding="utf-8")))


def remove_old_checkpoints(folder: Path, keep: int | None) -> None:
    """Keep the newest ``keep`` checkpoints (None: all), and no unfinished one that is older than the newest."""
    committed = committed_checkpoints(folder)
    if not committed:
        return
    newest = step_of(committed[-1]) or 0
    surplus = committed[:-keep] if keep else []
    unfinished = [p for p in folder.iterdir() if p not in committed and (step_of(p) or newest) < newest]
    for path in [*surplus, *unfinished]:
        (path / MARKER).unlink(missing_ok=True)  # first, so that a removal cut short leaves nothing that looks valid
        shutil.rmtree(path)


def set_aside_later_checkpoints(folder: Path, step: int) -> None:
    """Rename the checkpoints after ``step`` to ``....abandoned``: the run continues from an earlier one."""
    for path in committed_checkpoints(folder):
        if (step_of(path) or 0) > step:
            target = path.with_name(f"{path.name}.abandoned")
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
            logger.warning("the run continues from step %d; %s is set aside as %s", step, path.name, target.name)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cause(error: BaseException) -> str:
    """The innermost messages of an error: a CheckpointException wraps one per process."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"process {rank}: {failure[0]}" for rank, failure in error.failures.items())
    return f"{type(error).__name__}: {error}"


def _random_state() -> dict[str, Any]:
    numpy_state = np.random.get_state(legacy=True)
    return {
        "python": json.loads(json.dumps(random.getstate())),
        "numpy": [numpy_state[0], base64.b64encode(numpy_state[1].tobytes()).decode(), *numpy_state[2:]],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }


def _set_random_state(saved: dict[str, Any]) -> None:
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, np.frombuffer(base64.b64decode(keys), dtype=np.uint32), *rest))
    torch.set_rng_state(torch.from_numpy(np.frombuffer(base64.b64decode(saved["torch"]), dtype=np.uint8).copy()))
