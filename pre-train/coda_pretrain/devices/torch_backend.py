"""Plain torch devices: one CPU or GPU, or several processes under `torchrun` with FSDP2 (gloo or NCCL)."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import zeros as distributed_zeros
from transformers.utils import is_flash_attn_2_available

from CoDALanguageModel.errors import UserError

from .backend import Backend, host_tensors, process_environment
from .config import HardwareConfig


class TorchBackend(Backend):
    """CPU and CUDA. With several processes, weights are sharded over `fsdp` and copied over `data`."""

    def __init__(self, config: HardwareConfig) -> None:
        """See `Backend`.

        Raises:
            UserError: no CUDA device, or the number of processes does not fit the mesh.
        """
        super().__init__(config)
        self.rank, local_rank, self.num_processes = process_environment()
        if config.backend == "cuda":
            if not torch.cuda.is_available():
                raise UserError("hardware.backend 'cuda' needs a GPU that torch can see, found none; 'cpu' needs none")
            torch.cuda.set_device(local_rank)
        self.device = torch.device(config.backend)
        self.mesh_shape = config.mesh.shape(self.num_processes)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._owns_group = False
        self._saving_group: dist.ProcessGroup | None = None
        if self.num_processes > 1:
            self._owns_group = not dist.is_initialized()
            if self._owns_group:
                dist.init_process_group("nccl" if config.backend == "cuda" else "gloo")
            self._mesh = init_device_mesh(config.backend, self.mesh_shape[:2], mesh_dim_names=("data", "fsdp"))
            self._saving_group = dist.new_group(backend="gloo")  # checkpoints are written beside the training
            self.gradient_scale = float(
                self.num_processes
            )  # FSDP2 averages; the losses of processes are parts of a sum

    def rows_of_part(self, num_rows: int) -> list[int]:
        """An equal run of rows for each process."""
        share = num_rows // self.num_processes
        return list(range(self.rank * share, (self.rank + 1) * share))

    def prepare_kernel(self, name: str) -> None:
        """See `Backend`."""
        if name == "flash_attention_2" and not is_flash_attn_2_available():
            raise UserError(
                "model.attn_implementation 'flash_attention_2' needs the package flash-attn, which is not installed; "
                "'flex_attention' needs none"
            )

    def prepare_model(self, model: nn.Module, *, z_loss: float = 0.0) -> nn.Module:
        """Move to the device; checkpoint and compile each layer if asked; shard if there are several processes."""
        model.z_loss = z_loss
        model.to(self.device)
        if self.config.remat:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.config.compile:
            for layer in model.model.layers:
                layer.compile()
        if self.num_processes > 1:
            mesh = self._mesh["fsdp"] if self.mesh_shape[0] == 1 else self._mesh
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model

    def zeros(self, parameter: nn.Parameter, dims: tuple[int, ...]) -> Tensor:
        """See `Backend`."""
        shape = [parameter.shape[d] for d in dims]
        if not isinstance(parameter, DTensor):
            return torch.zeros(shape, dtype=torch.float32, device=parameter.device)
        placements = [
            Shard(dims.index(p.dim)) if isinstance(p, Shard) and p.dim in dims else Replicate()
            for p in parameter.placements
        ]
        return distributed_zeros(shape, dtype=torch.float32, device_mesh=parameter.device_mesh, placements=placements)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function itself: layers are compiled one by one, in `prepare_model`."""
        return function

    def to_device(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """See `Backend`."""
        tensors = host_tensors(batch)
        if self.device.type == "cuda":
            return {name: t.pin_memory().to(self.device, non_blocking=True) for name, t in tensors.items()}
        return tensors

    def autocast(self) -> AbstractContextManager[Any]:
        """See `Backend`."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """See `Backend`."""
        if self.num_processes == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        """See `Backend`."""
        if self.num_processes > 1:
            dist.barrier()

    def compile_count(self) -> int | None:
        """Graphs that `torch.compile` has made of the layers; None without `hardware.compile`."""
        if not self.config.compile:
            return None
        from torch._dynamo.utils import counters  # takes a second, and only compiled runs have it loaded anyway

        return counters["stats"]["unique_graphs"]

    def host_copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """See `Backend`."""
        plain = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
        return DefaultStager(plain).stage({name: tensor.detach() for name, tensor in tensors.items()})

    def saving_group(self) -> dist.ProcessGroup | None:
        """See `Backend`."""
        return self._saving_group

    def save_planner(self) -> SavePlanner:
        """See `Backend`."""
        return DefaultSavePlanner()

    def load_planner(self) -> LoadPlanner:
        """See `Backend`."""
        return DefaultLoadPlanner()

    def close(self) -> None:
        """See `Backend`."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
