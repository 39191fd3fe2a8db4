"""torch_xla SPMD: one program over a mesh of devices, TPU or virtual CPU ones (``CPU_NUM_DEVICES``)."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.distributed.spmd as xs
import torch_xla.distributed.xla_backend  # noqa: F401 (makes xla:// known to torch.distributed)
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlan, SavePlanner
from torch_xla.experimental.distributed_checkpoint import SPMDLoadPlanner, SPMDSavePlanner
from torch_xla.experimental.distributed_checkpoint._helpers import _sharded_cpu_state_dict
from torch_xla.utils.checkpoint import checkpoint

from ..config import HardwareConfig
from .base import Backend, host_tensors
from .sharding import AXES, Spec, partition_specs


class EachShardOnceSavePlanner(SPMDSavePlanner):
    """torch_xla's planner, writing each shard once.

    Where several devices of a process hold the same shard, its own plan lists the shard several times, and the removal
    of duplicates across plans then drops every copy, so the tensor would be missing from the checkpoint.
    """

    def create_local_plan(self) -> SavePlan:
        """The plan of this process, with the first of equal items kept."""
        plan = super().create_local_plan()
        return replace(
            plan, items=list({(i.index.fqn, i.index.offset): i for i in reversed(plan.items)}.values())[::-1]
        )


class XlaBackend(Backend):
    """SPMD over (data, fsdp, tensor). The process sees one big device; XLA splits it."""

    capturable_optimizer = True

    def __init__(self, config: HardwareConfig) -> None:
        """See ``Backend``. Must run before anything starts torch's autograd engine in this process.

        Raises:
            ValueError: the number of devices does not fit the mesh.
        """
        super().__init__(config)
        xr.use_spmd()
        num_devices = xr.global_runtime_device_count()  # creates the client, which autograd must find when it starts
        self.device = torch_xla.device()
        self.rank, self.num_processes = xr.process_index(), xr.process_count()
        self.mesh_shape = config.mesh.shape(num_devices)
        self._mesh = xs.Mesh(np.arange(num_devices), self.mesh_shape, AXES)
        self._specs: dict[int, Spec] = {}
        self._saving_group: dist.ProcessGroup | None = None
        if self.num_processes > 1:  # one process per host; what is not on the devices goes between them over gloo
            if not dist.is_initialized():
                dist.init_process_group("gloo", init_method="xla://")
            self._saving_group = dist.new_group(backend="gloo")

    def rows_for_process(self, num_rows: int) -> range:
        """All rows: each process passes the global batch and keeps the shards of its own devices.

        That is right for every mesh. Loading only a process's own rows needs a mesh whose batch axes follow the
        processes.
        """
        return range(num_rows)

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Move to the device and give every weight its partition spec.

        Raises:
            ValueError: the sharding rules do not cover the weights.
        """
        names = [(name, parameter.dim()) for name, parameter in model.named_parameters()]
        specs = partition_specs(names, self.config.sharding_rules)
        model.to(self.device)
        model.tie_weights()  # .to("xla") makes two weights of one
        for name, parameter in model.named_parameters():
            self._specs[id(parameter)] = specs[name]
            xs.mark_sharding(parameter, self._mesh, specs[name])
        if self.config.remat:
            model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=checkpoint)
        torch_xla.sync()
        return model

    def zeros(self, parameter: nn.Parameter, dims: tuple[int, ...]) -> Tensor:
        """See ``Backend``."""
        # From the host: zeros made on the device are constants of the first graph and give the second step another one.
        zeros = torch.zeros([parameter.shape[d] for d in dims], dtype=torch.float32).to(self.device)
        spec = self._specs[id(parameter)]
        xs.mark_sharding(zeros, self._mesh, tuple(spec[d] for d in dims))
        return zeros

    def clear_gradient(self, parameter: nn.Parameter) -> None:
        """See ``Backend``. The zeros are a constant, which would come out of the graph whole on every device."""
        super().clear_gradient(parameter)
        assert parameter.grad is not None, "checked by the base class"
        xs.clear_sharding(parameter.grad)
        xs.mark_sharding(parameter.grad, self._mesh, self._specs[id(parameter)])

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """One graph of the whole function; reading a device value inside it is an error."""
        return torch_xla.compile(function, full_graph=True)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """See ``Backend``."""
        tensors = host_tensors(batch)
        # Vectors go to every device: the transfer cannot split a tensor of one dimension over two axes.
        layouts = [(("data", "fsdp"), *[None] * (t.dim() - 1)) if t.dim() > 1 else (None,) for t in tensors.values()]
        specs = [xs.ShardingSpec(self._mesh, layout) for layout in layouts]
        placed = [
            xm.send_cpu_data_to_device([tensor], self.device, spec)[0]
            for tensor, spec in zip(tensors.values(), specs, strict=True)
        ]
        return dict(zip(tensors, placed, strict=True))

    def autocast(self) -> AbstractContextManager[Any]:
        """See ``Backend``."""
        return torch.autocast("xla", dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def sum_over_processes(self, values: list[float]) -> list[float]:
        """The values: a number read from a sharded program is already global."""
        return values

    def any_over_processes(self, flags: list[bool]) -> list[bool]:
        """See ``Backend``. The flags are of the hosts, not of the devices."""
        if self.num_processes == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def barrier(self) -> None:
        """See ``Backend``."""
        if self.num_processes > 1:
            xm.rendezvous("coda_pretrain")

    def host_copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """See ``Backend``."""
        return _sharded_cpu_state_dict({name: tensor.detach() for name, tensor in tensors.items()})

    def saving_group(self) -> dist.ProcessGroup | None:
        """See ``Backend``."""
        return self._saving_group

    def save_planner(self) -> SavePlanner:
        """See ``Backend``."""
        return EachShardOnceSavePlanner()

    def load_planner(self) -> LoadPlanner:
        """See ``Backend``."""
        return SPMDLoadPlanner()

    def compile_count(self) -> int:
        """See ``Backend``."""
        return int(met.counter_value("UncachedCompile") or 0)
