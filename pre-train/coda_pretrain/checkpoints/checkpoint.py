"""Checkpoints: written whole or not at all, verified before use, readable by every backend, local or behind a URL.

`FOLDER/step-XXXXXXXX/` holds `tensors/` (torch.distributed.checkpoint, one flat mapping of names:
`model.WEIGHT` and `optim.WEIGHT.KEY`), `state.json` (step, data position and other numbers), `rng.json`,
`config.yaml` (the run), `model_config.json` (`CoDAConfig`), `data.json` (the token shards it has read) and,
written last, `COMMITTED.json` with the size and hash of every other file. A folder without it is an unfinished save
and is never read. A run that continues compares all sizes and the hashes of the small files first; the hash of a file
of tensors is compared by the processes that read from it, when they do. Not here: what is in the tensors, writing them
(`saver`), and the export to safetensors (`export`).
"""

import base64
import json
import logging
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from CoDALanguageModel.errors import UserError

from ..devices.backend import Planners
from ..places import Place, move_tree, place_of, remove_tree, sha256_of, sizes_below

logger = logging.getLogger(__name__)

MARKER = "COMMITTED.json"
FORMAT_VERSION = 1
TENSOR_SUFFIX = ".distcp"
OTHER_HASH = "has another hash than at its commit"
STEP_FOLDER = re.compile(r"step-(\d{8,})")


class CorruptTensorsError(RuntimeError):
    """A file of tensors has other content than at its commit; the message says which."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message says why and which one is still good."""


@dataclass(kw_only=True)
class TrainState:
    """Everything about a run's position that is not a tensor."""

    step: int = 0
    """Finished steps; also the data position, since step s reads samples `[s * B, (s + 1) * B)`."""

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


def step_folder(folder: Place, step: int) -> Place:
    """Where the checkpoint of `step` lies in `folder`."""
    return folder / f"step-{step:08d}"


def step_of(path: Place) -> int | None:
    """The step that a checkpoint folder's name states; None for another name."""
    match = STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else None


def committed_checkpoints(folder: Place) -> list[Place]:
    """The finished checkpoints of `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if step_of(path) is not None and (path / MARKER).is_file()]
    return sorted(found, key=lambda path: step_of(path) or 0)


def fault_of(path: Place, *, tensors: bool = True) -> str | None:
    """What is wrong with a checkpoint, compared with the sizes and hashes at its commit; None if nothing is.

    Args:
        path: the checkpoint.
        tensors: also hash the files of the tensors, which are nearly all of it.
    """
    try:
        files = committed_files(path)
    except FileNotFoundError:
        return f"it has no {MARKER}, so its save never finished"
    except (json.JSONDecodeError, KeyError, TypeError):
        return f"its {MARKER} cannot be read"
    sizes = sizes_below(path)
    for name, expected in files.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != expected["size"]:
            return f"{name} has {sizes[name]} bytes instead of {expected['size']}"
        is_hashed = tensors or not name.endswith(TENSOR_SUFFIX)
        if is_hashed and sha256_of(path / name) != expected["sha256"]:
            return f"{name} {OTHER_HASH}"
    return None


def committed_files(path: Place) -> dict[str, dict[str, Any]]:
    """`size` and `sha256` of each file of a checkpoint at its commit."""
    return json.loads((path / MARKER).read_text(encoding="utf-8"))["files"]


def intact_checkpoint(path: Place, *, tensors: bool = True) -> Place:
    """`path`, after verifying it; `tensors` as for `fault_of`.

    Raises:
        UserError: it is incomplete or corrupt; the newest intact one beside it is offered.
    """
    fault = fault_of(path, tensors=tensors)
    if fault is None:
        return path
    raise _corrupt(path, fault)


def _corrupt(path: Place, fault: str) -> UserError:
    """The error that names a fault and offers the newest intact checkpoint beside `path`."""
    others = [other for other in reversed(committed_checkpoints(path.parent)) if other != path]
    good = next((other for other in others if fault_of(other) is None), None)
    offer = (
        f"the newest intact one is {good}: continue from it with checkpoint.resume={good}"
        if good
        else "there is no intact one beside it"
    )
    return UserError(f"the checkpoint {path} is corrupt: {fault}; {offer}")


def checkpoint_to_resume(setting: str | int, folder: Place) -> Place | None:
    """The checkpoint that `checkpoint.resume` asks for; None to start from the beginning.

    Sizes and small files are verified here, tensors by `load_checkpoint`.

    Args:
        setting: `auto`, `latest`, `never`, a step, or the path or URL of a checkpoint.
        folder: the checkpoints folder of the run.

    Raises:
        UserError: `never` in a folder that has checkpoints, `latest` in one that has none, no checkpoint of the
            step or at the path, or a corrupt one.
    """
    committed = committed_checkpoints(folder)
    if setting == "never":
        if committed:
            raise UserError(
                f"checkpoint.resume is 'never', but {folder} holds checkpoints up to {committed[-1].name}: "
                "give another output_dir, or checkpoint.resume=auto to continue"
            )
        return None
    if isinstance(setting, int):
        wanted = step_folder(folder, setting)
        if wanted not in committed:
            steps = ", ".join(str(step_of(path)) for path in committed) or "none"
            raise UserError(f"checkpoint.resume is step {setting}, but {folder} has the steps: {steps}")
        return intact_checkpoint(wanted, tensors=False)
    if setting not in ("auto", "latest"):
        if not place_of(setting).is_dir():
            raise UserError(
                f"checkpoint.resume must be auto, latest, never, a step or a checkpoint folder, got {setting!r}"
            )
        return intact_checkpoint(place_of(setting), tensors=False)
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if step_of(path) is not None and path not in committed:
            logger.warning("%s was never finished and is ignored", path)
    if not committed:
        if setting == "latest":
            raise UserError(f"checkpoint.resume is 'latest', but {folder} has no finished checkpoint")
        return None
    logger.info("resume=%s takes %s", setting, committed[-1])
    return intact_checkpoint(committed[-1], tensors=False)


def load_checkpoint(path: Place, tensors: Mapping[str, Tensor], *, backend: Planners) -> TrainState:
    """Fill `tensors` in place, restore this process's random state and give back the numbers.

    Each process hashes the files that it reads from, and no other.

    Raises:
        UserError: the checkpoint does not hold these tensors in these shapes, or one that is needed is corrupt.
    """
    group = backend.saving_group()
    try:
        dcp.load(
            dict(tensors),
            storage_reader=tensor_reader(path, verify=True),
            planner=backend.load_planner(),
            process_group=group,
            no_dist=group is None,
        )
    except (RuntimeError, ValueError, KeyError, CheckpointException) as error:
        corrupt = [fault for fault in _errors_in(error) if isinstance(fault, CorruptTensorsError)]
        if corrupt:
            raise _corrupt(path, str(corrupt[0])) from error
        raise UserError(
            f"the checkpoint {path} does not fit this run's model and optimizer: {cause_of(error)}"
        ) from error
    _set_random_state(json.loads((path / "rng.json").read_text(encoding="utf-8")))
    return TrainState(**json.loads((path / "state.json").read_text(encoding="utf-8")))


def tensor_reader(path: Place, *, verify: bool = False) -> dcp.FileSystemReader:
    """What reads the tensors of a checkpoint; `verify` compares the hash of each file before it is read from."""
    tensors = path / "tensors"
    kind: type[dcp.FileSystemReader] = dcp.FileSystemReader
    if not isinstance(tensors, Path):
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        kind = FsspecReader

    class VerifyingReader(kind):
        def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
            files = committed_files(path)
            for name in sorted({self.storage_data[item.storage_index].relative_path for item in plan.items}):
                if sha256_of(tensors / name) != files[f"tensors/{name}"]["sha256"]:
                    raise CorruptTensorsError(f"tensors/{name} {OTHER_HASH}")
            return super().read_data(plan, planner)

    return (VerifyingReader if verify else kind)(str(tensors))


def _errors_in(error: BaseException) -> list[BaseException]:
    """The errors of all processes in a `CheckpointException`, or the error itself."""
    if isinstance(error, CheckpointException):
        return [failure[0] for failure in error.failures.values()]
    return [error]


def remove_old_checkpoints(folder: Place, keep: int | None) -> None:
    """Keep the newest `keep` checkpoints (None: all), and no unfinished one that is older than the newest."""
    committed = committed_checkpoints(folder)
    if not committed:
        return
    newest = step_of(committed[-1]) or 0
    surplus = committed[:-keep] if keep else []
    unfinished = [p for p in folder.iterdir() if p not in committed and (step_of(p) or newest) < newest]
    for path in [*surplus, *unfinished]:
        (path / MARKER).unlink(missing_ok=True)  # first, so that a removal cut short leaves nothing that looks valid
        remove_tree(path)


def set_aside_later_checkpoints(folder: Place, step: int) -> None:
    """Rename the checkpoints after `step` to `....abandoned`: the run continues from an earlier one."""
    for path in committed_checkpoints(folder):
        if (step_of(path) or 0) > step:
            target = path.with_name(f"{path.name}.abandoned")
            remove_tree(target)
            move_tree(path, target, last=MARKER)
            logger.warning("the run continues from step %d; %s is set aside as %s", step, path.name, target.name)


def cause_of(error: BaseException) -> str:
    """The innermost messages of an error: a CheckpointException wraps one per process."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"process {rank}: {failure[0]}" for rank, failure in error.failures.items())
    return f"{type(error).__name__}: {error}"


def random_state() -> dict[str, Any]:
    """The states of this process's generators, as JSON can hold them."""
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
