"""What chips can do: peak, memory, and what their compilers and kernels want. Vendors' figures; free of torch."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

ChipName = Literal["v4", "v5e", "v5p", "v6e", "A100", "H100", "H200"]


@dataclass(frozen=True)
class Chip:
    """One accelerator, as a mesh counts devices."""

    peak_tflops: float
    """Dense bf16, in 1e12 operations a second."""

    memory_gib: float
    """What a program can use."""

    kind: Literal["tpu", "gpu"]

    splash_block: int = 512
    """TPUs: positions of queries and of keys that splash holds at a time. What it keeps of them, and of the scores,
    must fit into the memory beside the matrix units: 16 MiB on a v4, which 2048 x 2048 scores in float32 fill."""

    libtpu_args: tuple[str, ...] = ()
    """TPUs: flags for the compiler of libtpu."""


# Collectives run beside the matrix products: what the vendor's own training recipes set.
ASYNC_COLLECTIVES = (
    "--xla_enable_async_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
)
V6E_KERNEL_MEMORY = "--xla_tpu_scoped_vmem_limit_kib=98304"  # blocks of 2048 need more than the 16 MiB of the default


CHIPS: dict[str, Chip] = {
    "v4": Chip(275.0, 32.0, "tpu", 512, ASYNC_COLLECTIVES),
    "v5e": Chip(197.0, 16.0, "tpu", 1024, ASYNC_COLLECTIVES),
    "v5p": Chip(459.0, 95.0, "tpu", 1024, ASYNC_COLLECTIVES),
    "v6e": Chip(918.0, 32.0, "tpu", 2048, (*ASYNC_COLLECTIVES, V6E_KERNEL_MEMORY)),
    "A100": Chip(312.0, 79.0, "gpu"),
    "H100": Chip(989.0, 79.0, "gpu"),
    "H200": Chip(989.0, 139.0, "gpu"),
}
"""Vendors' figures; blocks and flags are what others train with and were not measured by us. The GPUs are the SXM
boards (A100 with 80 GB); PCIe boards of the same name are slower."""

assert set(CHIPS) == set(get_args(ChipName)), "the configuration's choices are the table's"


def chip_of_gpu(device_name: str) -> ChipName | None:
    """The chip that a CUDA device name states; None for one whose peak is not in the table, PCIe boards included."""
    if re.search(r"PCIe|NVL|MIG", device_name):
        return None
    match = re.search(r"\b(A100|H100|H200)\b", device_name)
    return match[1] if match else None  # type: ignore[return-value]
