"""The seam between the trainer and the machine. A backend places tensors; it knows no loss, schedule or file name.

Its parts are small protocols, each handed to those who need it: update rules see a `Placement`, checkpoints
`Planners`. The training step alone sees all of a `Backend`.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner

from CoDALanguageModel.errors import UserError

from .config import HardwareConfig


class Placement(Protocol):
    """Makes tensors that lie where a weight lies."""

    traces_steps: bool
    """A step is traced and runs as a device graph: it reads no value of the device, and skips itself if not finite."""

    def zeros(self, parameter: nn.Parameter, dims: tuple[int, ...]) -> Tensor:
        """Float32 zeros of the shape `[parameter.shape[d] for d in dims]`, placed like those dimensions of it."""

    def copy(self, parameter: nn.Parameter) -> Tensor:
        """A copy of the weight, placed like it, that is no weight."""

    def host_scalars(self, values: list[float]) -> list[float] | list[Tensor]:
        """Host scalars as a step can use them without becoming another step."""


class Planners(Protocol):
    """Reads and writes the tensors of a checkpoint, one process among others."""

    rank: int

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all."""

    def saving_group(self) -> ProcessGroup | None:
        """The group in which processes agree about a checkpoint, used by nothing else; None for a single process."""

    def host_copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Copies in the memory of the host, which later steps do not change and the save planner accepts."""

    def save_planner(self) -> SavePlanner:
        """How tensors of this backend are written to a checkpoint."""

    def load_planner(self) -> LoadPlanner:
        """How tensors of this backend are filled in place from a checkpoint."""


class Backend(Placement, Planners, ABC):
    """One machine, one process of it. The batch is split over the first two axes of the mesh (data, fsdp)."""

    rank: int = 0
    num_processes: int = 1
    mesh_shape: tuple[int, int, int]
    """Sizes of (data, fsdp, tensor)."""

    gradient_scale: float = 1.0
    """The loss is multiplied by this before the backward pass, to undo an average over processes."""

    traces_steps: bool = False

    def __init__(self, config: HardwareConfig) -> None:
        """Reach the devices and lay out the mesh.

        Raises:
            UserError: the devices are absent or do not fit the mesh.
        """
        self.config = config

    @property
    def is_main(self) -> bool:
        """See `Planners`."""
        return self.rank == 0

    def check_rows(self, name: str, rows: int) -> None:
        """See the function of this name."""
        check_rows(name, rows, self.mesh_shape)

    def rows_for_process(self, num_rows: int, num_parts: int = 1) -> list[int]:
        """Which rows of a global batch this process has to supply.

        Args:
            num_rows: rows of the global batch.
            num_parts: the batch goes through the model in so many equal runs of rows. This process's share of each
                run comes after its share of the run before, so `split_rows` gives the parts.
        """
        size = num_rows // num_parts
        return [part * size + row for part in range(num_parts) for row in self.rows_of_part(size)]

    @abstractmethod
    def rows_of_part(self, num_rows: int) -> list[int]:
        """Which of `num_rows` rows that go through the model at once this process supplies, in ascending order."""

    def prepare_kernel(self, name: str) -> None:  # noqa: B027 (most backends take those of transformers)
        """Make the attention kernel of that name known before a model is built.

        Args:
            name: `model.attn_implementation`.

        Raises:
            UserError: the devices cannot run it.
        """

    @abstractmethod
    def prepare_model(self, model: nn.Module, *, z_loss: float = 0.0) -> nn.Module:
        """Move, shard, wrap or compile a model built on the CPU in float32. Weight names do not change.

        Args:
            model: a `CoDALanguageModel`.
            z_loss: see `OptimizerConfig`.
        """

    @abstractmethod
    def zeros(self, parameter: nn.Parameter, dims: tuple[int, ...]) -> Tensor:
        """See `Placement`."""

    def copy(self, parameter: nn.Parameter) -> Tensor:
        """See `Placement`."""
        return parameter.detach().clone()

    def clear_gradient(self, parameter: nn.Parameter) -> None:
        """Forget the gradient."""
        parameter.grad = None

    def host_scalars(self, values: list[float]) -> list[float] | list[Tensor]:
        """See `Placement`."""
        return values

    @abstractmethod
    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of device tensors made ready to be called at every step. Its results may be lazy."""

    @abstractmethod
    def to_device(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """Move this process's rows to the device(s). Dimension 0 of every array is the row."""

    @abstractmethod
    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward pass."""

    @abstractmethod
    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over all processes, the same on each of them."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait for all processes."""

    def all_reduce_any(self, flags: list[bool]) -> list[bool]:
        """Per flag, whether some process raised it; the same on each of them."""
        return [total > 0 for total in self.all_reduce_sum([float(flag) for flag in flags])]

    @abstractmethod
    def host_copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """See `Planners`."""

    @abstractmethod
    def saving_group(self) -> ProcessGroup | None:
        """See `Planners`."""

    @abstractmethod
    def save_planner(self) -> SavePlanner:
        """See `Planners`."""

    @abstractmethod
    def load_planner(self) -> LoadPlanner:
        """See `Planners`."""

    def compile_count(self) -> int | None:
        """Device graphs compiled so far; None where nothing is compiled by the device."""
        return None

    def close(self) -> None:  # noqa: B027 (most backends have nothing to leave)
        """Leave the process group, if one was joined."""


def check_rows(name: str, rows: int, mesh: tuple[int, int, int]) -> None:
    """Check that `rows` rows can be split over a mesh (data, fsdp, tensor); `name` is the setting they come from.

    Raises:
        UserError: they cannot.
    """
    data, fsdp, _ = mesh
    if rows % (data * fsdp):
        raise UserError(
            f"{name} must be a multiple of the {data * fsdp} devices that share the batch "
            f"(hardware.mesh data {data} x fsdp {fsdp}), got {rows}"
        )


def process_environment() -> tuple[int, int, int]:
    """(rank, local rank, number of processes) as `torchrun` sets them; (0, 0, 1) without it."""
    rank, local, world = (int(os.environ.get(name, default)) for name, default in PROCESS_VARIABLES)
    return rank, local, world


PROCESS_VARIABLES = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


def host_tensors(batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """NumPy arrays as CPU tensors, without a copy where the array is contiguous; integers become int64."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}
    return {name: t if t.is_floating_point() or t.dtype == torch.bool else t.long() for name, t in tensors.items()}
