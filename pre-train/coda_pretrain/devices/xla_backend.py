"""torch_xla SPMD: one program over a mesh of devices, TPU or virtual CPU ones (`CPU_NUM_DEVICES`)."""

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
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

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.modeling_coda import LAYER_LOOPS, LOSSES

from .backend import Backend, host_tensors
from .config import HardwareConfig
from .kernels import SPLASH_KERNEL, register_segment_attention, register_splash
from .layers import LayerScan, partition_function
from .loss import chunk_positions, looped_cross_entropy
from .sharding import AXES, ActivationSpec, Spec, activation_specs, partition_specs, rows_of_devices


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


def _pin_output(mesh: xs.Mesh, spec: ActivationSpec, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A module's output, and later its gradient, split over the mesh as `spec` says."""
    return xs.mark_sharding_with_gradients(output, mesh, spec)


class XlaBackend(Backend):
    """SPMD over (data, fsdp, tensor). The process sees one big device; XLA splits it."""

    traces_steps = True

    def __init__(self, config: HardwareConfig) -> None:
        """See `Backend`. Must run before anything starts torch's autograd engine in this process.

        Raises:
            UserError: the number of devices does not fit the mesh.
        """
        super().__init__(config)
        if flags := config.libtpu_init_args(os.environ.get("LIBTPU_INIT_ARGS", "")):
            os.environ["LIBTPU_INIT_ARGS"] = flags  # read when the client is created, below
        if config.compilation_cache is not None:  # hosts may share the folder, and write files of the same names
            cache = Path(config.compilation_cache, socket.gethostname()).absolute()
            cache.mkdir(parents=True, exist_ok=True)
            xr.initialize_cache(str(cache))
        xr.use_spmd()
        num_devices = xr.global_runtime_device_count()  # creates the client, which autograd must find when it starts
        self.device = torch_xla.device()
        self._on_tpu = xm.xla_device_hw(self.device) == "TPU"
        if config.offload and not self._on_tpu:
            raise UserError("hardware.offload needs TPUs: virtual CPU devices have no memory apart from the host's")
        self.rank, self.num_processes = xr.process_index(), xr.process_count()
        self.mesh_shape = config.global_mesh_shape(num_devices)
        self._mesh = self._build_mesh(num_devices)
        self._device_mesh = np.asarray(self._mesh.device_ids).reshape(self.mesh_shape)
        self._local_devices = [int(name.split(":")[1]) for name in torch_xla._XLAC._xla_get_runtime_devices()]
        data, fsdp, _ = self.mesh_shape
        self._shards_of_rows = data * fsdp
        self._local_shards_of_rows = len(self.rows_of_part(data * fsdp))
        self._specs: dict[int, Spec] = {}
        self._graphs_of_setup = 0
        self._saving_group: dist.ProcessGroup | None = None
        if self.num_processes > 1:  # one process per host; what is not on the devices goes between them over gloo
            if not dist.is_initialized():
                dist.init_process_group("gloo", init_method="xla://")
            self._saving_group = dist.new_group(backend="gloo")

    def _build_mesh(self, num_devices: int) -> xs.Mesh:
        """Devices in the order of their ids within a slice; slices along `data`, for TPUs by what they report."""
        slices = self.config.dcn_mesh.data
        if slices == 1 or not self._on_tpu:  # virtual devices: equal runs of ids are the slices
            return xs.Mesh(np.arange(num_devices), self.mesh_shape, AXES)
        within = self.config.mesh.shape(num_devices // slices)
        return xs.HybridMesh(ici_mesh_shape=within, dcn_mesh_shape=(slices, 1, 1), axis_names=AXES)

    def rows_of_part(self, num_rows: int) -> list[int]:
        """The rows whose shards lie on this process's devices."""
        return rows_of_devices(num_rows, self._device_mesh, self._local_devices)

    def prepare_kernel(self, name: str) -> None:
        """See `Backend`."""
        if name == SPLASH_KERNEL:
            register_splash(
                self._mesh,
                on_tpu=self._on_tpu,
                interpret=self.config.interpret_kernels,
                longest_block=self.config.longest_splash_block(),
            )

    def prepare_model(self, model: nn.Module, *, z_loss: float = 0.0) -> nn.Module:
        """Move to the device and give every weight its partition spec.

        Raises:
            UserError: the sharding rules do not cover the weights.
        """
        names = [(name, parameter.dim()) for name, parameter in model.named_parameters()]
        specs = partition_specs(names, self.config.sharding_rules)
        model.to(self.device)
        model.tie_weights()  # .to("xla") makes two weights of one
        for name, parameter in model.named_parameters():
            self._specs[id(parameter)] = specs[name]
            xs.mark_sharding(parameter, self._mesh, specs[name])
        if self.config.activation_rules is not None:
            modules = dict(model.named_modules())
            for name, spec in activation_specs(modules, self.config.activation_rules).items():
                modules[name].register_forward_hook(partial(_pin_output, self._mesh, spec))
        if model.config._attn_implementation != SPLASH_KERNEL:
            model.config._attn_implementation = register_segment_attention()
        if self.config.layers == "scan":
            partition = partition_function(remat=self.config.remat, offload=self.config.offload)
            LAYER_LOOPS["scan"] = LayerScan(model.model, partition=partition)
            model.model.layer_loop = "scan"
        elif self.config.remat:
            model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=checkpoint)
        LOSSES["looped"] = self._cross_entropy
        model.loss_sum, model.z_loss = "looped", z_loss
        torch_xla.sync()
        return model

    def _cross_entropy(self, model: nn.Module, hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        data, fsdp, tensor = self.mesh_shape
        rows = -(-len(hidden) // (data * fsdp))
        vocab_size = -(-model.config.vocab_size // tensor)
        chunk = chunk_positions(rows, vocab_size, hidden.shape[1], self.config.loss_chunk)
        return looped_cross_entropy(
            hidden, labels, weights, model.lm_head.weight, chunk=chunk, z_loss=model.z_loss, mesh=self._mesh
        )

    def zeros(self, parameter: nn.Parameter, dims: tuple[int, ...]) -> Tensor:
        """See `Backend`."""
        # From the host: zeros made on the device are constants of the first graph and give the second step another one.
        zeros = torch.zeros([parameter.shape[d] for d in dims], dtype=torch.float32).to(self.device)
        spec = self._specs[id(parameter)]
        xs.mark_sharding(zeros, self._mesh, tuple(spec[d] for d in dims))
        return zeros

    def copy(self, parameter: nn.Parameter) -> Tensor:
        """See `Backend`."""
        copied = super().copy(parameter)
        xs.mark_sharding(copied, self._mesh, self._specs[id(parameter)])
        return copied

    def clear_gradient(self, parameter: nn.Parameter) -> None:
        """Set it to zero, keeping memory and placement: zeros alone are a constant, whole on every device."""
        assert parameter.grad is not None, "gradients are allocated before the first step"
        parameter.grad.zero_()
        xs.clear_sharding(parameter.grad)
        xs.mark_sharding(parameter.grad, self._mesh, self._specs[id(parameter)])

    def host_scalars(self, values: list[float]) -> list[Tensor]:
        """0-d tensors: Python numbers would be constants of the graph wherever they happen to be 0 or 1."""
        return xm.send_cpu_data_to_device([torch.tensor(value) for value in values], self.device)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """One graph of the whole function; reading a device value inside it is an error."""
        torch_xla.sync()
        self._graphs_of_setup = self._graphs()
        return torch_xla.compile(function, full_graph=True)

    def to_device(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """See `Backend`."""
        return {name: self._put_rows(tensor) for name, tensor in host_tensors(batch).items()}

    def _put_rows(self, rows: Tensor) -> Tensor:
        """This process's rows of one part as a tensor of all rows, of which each device gets its share."""
        if self.num_processes > 1:
            # The runtime takes the shards of its own devices out of a tensor of the global shape, whatever the mesh;
            # the other rows are never read.
            num_rows = len(rows) * self._shards_of_rows // self._local_shards_of_rows
            whole = rows.new_zeros((num_rows, *rows.shape[1:]))
            whole[self.rows_of_part(num_rows)] = rows
            rows = whole
        layout = (("data", "fsdp"), *[None] * (rows.dim() - 1))
        return xm.send_cpu_data_to_device([rows], self.device, xs.ShardingSpec(self._mesh, layout))[0]

    def autocast(self) -> AbstractContextManager[Any]:
        """See `Backend`."""
        return torch.autocast("xla", dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """The values: a number read from a sharded program is already global."""
        return values

    def all_reduce_any(self, flags: list[bool]) -> list[bool]:
        """See `Backend`. The flags are of the hosts, not of the devices."""
        if self.num_processes == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def barrier(self) -> None:
        """See `Backend`."""
        if self.num_processes > 1:
            xm.rendezvous("coda_pretrain")

    def host_copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """See `Backend`."""
        return _sharded_cpu_state_dict({name: tensor.detach() for name, tensor in tensors.items()})

    def saving_group(self) -> dist.ProcessGroup | None:
        """See `Backend`."""
        return self._saving_group

    def save_planner(self) -> SavePlanner:
        """See `Backend`."""
        return EachShardOnceSavePlanner()

    def load_planner(self) -> LoadPlanner:
        """See `Backend`."""
        return SPMDLoadPlanner()

    def compile_count(self) -> int:
        """See `Backend`. Graphs made while the run was set up (copies of weights, say) are not among them."""
        return self._graphs() - self._graphs_of_setup

    def _graphs(self) -> int:
        return int(met.counter_value("UncachedCompile") or 0)
