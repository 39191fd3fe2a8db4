"""The machine of a run: backend, mesh, precision and what the xla backend alone can do.

No `from __future__ import annotations` in this file: field types must stay types.
"""

from dataclasses import MISSING, dataclass, field, fields
from typing import Literal

from CoDALanguageModel.errors import UserError

from ..plain_data import require_range
from .chips import CHIPS, Chip, ChipName


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis. One axis may be -1: what is left of the devices."""

    data: int = 1
    """Copies of the model; each sees its own rows."""

    fsdp: int = -1
    """Shards of weights and optimizer state; each also sees its own rows."""

    tensor: int = 1
    """Shards inside each matrix product (xla only)."""

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size != -1 and size < 1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(f"hardware.mesh needs sizes >= 1 with at most one -1, got (data, fsdp, tensor) = {sizes}")

    def shape(self, num_devices: int) -> tuple[int, int, int]:
        """The (data, fsdp, tensor) sizes on `num_devices` devices.

        Raises:
            UserError: the product is not `num_devices`.
        """
        sizes = [self.data, self.fsdp, self.tensor]
        if -1 in sizes:
            known = 1
            for size in sizes:
                known *= size if size != -1 else 1
            sizes[sizes.index(-1)] = max(num_devices // known, 1)
        product = sizes[0] * sizes[1] * sizes[2]
        if product != num_devices:
            raise UserError(
                f"hardware.mesh (data, fsdp, tensor) = {tuple(sizes)} needs {product} devices, "
                f"this run has {num_devices}"
            )
        return sizes[0], sizes[1], sizes[2]


@dataclass(frozen=True, kw_only=True)
class DcnMeshConfig:
    """How slices, joined by the data centre's network, are used. Within a slice `MeshConfig` holds."""

    data: int = 1
    """Number of slices. Each holds a copy of the model and sees its own rows."""

    def __post_init__(self) -> None:
        require_range("hardware.dcn_mesh.data", self.data, at_least=1)


XLA_SETTINGS = (
    "sharding_rules",
    "dcn_mesh",
    "layers",
    "offload",
    "loss_chunk",
    "activation_rules",
    "interpret_kernels",
    "splash_block",
    "libtpu_args",
    "compilation_cache",
)
"""Settings with no effect elsewhere."""


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """The machine: nothing here changes what is learnt, up to rounding."""

    backend: Literal["cpu", "cuda", "xla"] = "cpu"
    mesh: MeshConfig = field(default_factory=MeshConfig)
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` runs the forward pass under autocast; weights, gradients' sums and optimizer state stay float32."""

    remat: bool = False
    """Recompute each layer's activations in the backward pass."""

    compile: bool = False
    """`torch.compile` the layers (cpu, cuda). The xla backend always compiles."""

    sharding_rules: dict[str, list[str | None]] | None = None
    """xla: fnmatch pattern of a weight's name -> mesh axis of each of its dimensions; the built-in table when null."""

    num_threads: int | None = None
    """cpu: threads of one matrix product; null leaves torch's choice."""

    dcn_mesh: DcnMeshConfig = field(default_factory=DcnMeshConfig)
    """xla: several slices. `mesh` is then the mesh of one slice."""

    layers: Literal["loop", "scan"] = "loop"
    """`scan` (xla) compiles one layer and runs it in a loop on the device: a compilation does not grow with depth,
    and `remat` frees what a compiler may otherwise keep. `loop` is one graph of all layers."""

    offload: bool = False
    """xla on TPU, with `layers: scan` and `remat`: each layer's input waits in the host's memory for the backward
    pass."""

    loss_chunk: int | None = None
    """xla: positions of each row whose logits are held at a time; null takes what makes 2**26 logits on a device."""

    activation_rules: dict[str, list[str | list[str] | None]] | None = None
    """xla: fnmatch pattern of a module's name -> mesh axis, or axes, of each dimension of its output; null pins
    nothing and leaves it to the compiler."""

    interpret_kernels: bool = False
    """xla on virtual CPU devices: run TPU kernels (`splash`) in their interpreter. Exact and very slow: for tests."""

    splash_block: int | None = None
    """xla: most positions of queries and of keys that `splash` holds at a time, a multiple of 128; null takes the
    default of `chip`."""

    libtpu_args: list[str] | None = None
    """xla on TPUs: flags for libtpu; null takes those of `chip`. A flag that the environment's LIBTPU_INIT_ARGS
    already sets is left as it is."""

    compilation_cache: str | None = None
    """xla: local folder in which compiled programs are kept, so that a restart does not compile them again. Each host
    has a subfolder of its own."""

    chip: ChipName | None = None
    """The accelerator, for MFU and `plan`; a GPU is recognised by its name when null."""

    peak_tflops: float | None = None
    """Dense bf16 peak of one device, in 1e12 operations a second, for a device that `chip` cannot name."""

    def global_mesh_shape(self, num_devices: int) -> tuple[int, int, int]:
        """The (data, fsdp, tensor) sizes over all slices.

        Raises:
            UserError: the devices do not fit the mesh.
        """
        slices = self.dcn_mesh.data
        if num_devices % slices:
            raise UserError(f"hardware.dcn_mesh.data must divide the {num_devices} devices of the run, got {slices}")
        data, fsdp, tensor = self.mesh.shape(num_devices // slices)
        return slices * data, fsdp, tensor

    def longest_splash_block(self) -> int:
        """`splash_block`, or the default of the chip."""
        return self.splash_block or (CHIPS[self.chip].splash_block if self.chip else Chip.splash_block)

    def libtpu_init_args(self, present: str) -> str:
        """LIBTPU_INIT_ARGS of a run whose environment has the value `present`."""
        flags = self.libtpu_args if self.libtpu_args is not None else CHIPS[self.chip].libtpu_args if self.chip else ()
        given = {word.partition("=")[0] for word in present.split()}
        return " ".join([*present.split(), *(flag for flag in flags if flag.partition("=")[0] not in given)])

    def __post_init__(self) -> None:
        if self.splash_block is not None and (self.splash_block < 128 or self.splash_block % 128):
            raise UserError(f"hardware.splash_block must be a multiple of 128, at least 128, got {self.splash_block}")
        wrong = [flag for flag in self.libtpu_args or () if not flag.startswith("--") or len(flag.split()) != 1]
        if wrong:
            raise UserError(f"hardware.libtpu_args must be flags like --name=value, got {wrong[0]!r}")
        if self.peak_tflops is not None:
            require_range("hardware.peak_tflops", self.peak_tflops, above=0.0)
        if self.num_threads is not None:
            require_range("hardware.num_threads", self.num_threads, at_least=1)
        if self.compile and self.backend == "xla":
            raise UserError("hardware.compile is for cpu and cuda; the xla backend always compiles, leave it false")
        for setting in fields(self):
            default = setting.default if setting.default_factory is MISSING else setting.default_factory()
            if self.backend != "xla" and setting.name in XLA_SETTINGS and getattr(self, setting.name) != default:
                raise UserError(f"hardware.{setting.name} has no effect on backend {self.backend!r}, only on 'xla'")
        if self.loss_chunk is not None:
            require_range("hardware.loss_chunk", self.loss_chunk, at_least=1)
        if self.offload and not (self.layers == "scan" and self.remat):
            raise UserError(
                "hardware.offload needs hardware.layers 'scan' and hardware.remat true: only then is the layer's input "
                f"all that is kept, got layers {self.layers!r} and remat {self.remat}"
            )
        if self.mesh.tensor not in (1, -1) and self.backend != "xla":
            raise UserError(f"hardware.mesh.tensor > 1 needs backend 'xla', got backend {self.backend!r}")
