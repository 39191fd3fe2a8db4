"""The arithmetic that training needs, and what chips can do: the two sides of MFU. Free of torch and of devices.

Counted are the multiply-adds of the matrix products that the objective asks for, two operations each: attention over
the pairs of one document in both directions (nothing is halved, unlike with a causal mask), the head on masked
positions only, three times the forward pass for a training step. Not counted: padding, recomputed activations, norms,
and work that a kernel does without need, such as pairs of different documents or logits of clean positions.
"""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np

ChipName = Literal["v4", "v5e", "v5p", "v6e", "A100", "H100", "H200"]
IGNORED_LABEL = -100
TRAINING_PASSES = 3  # forward, gradient by the activations, gradient by the weights: a matrix product each


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


class ModelShape(Protocol):
    """The fields of ``CoDAConfig`` that the count needs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


class Work(NamedTuple):
    """What a batch asks of the network."""

    tokens: float  # positions that hold a token
    attended_pairs: float  # (query, key) pairs: the sum of the squared lengths of all documents
    scored: float  # masked positions, whose logits the loss needs

    def scaled(self, factor: float) -> "Work":
        """``factor`` times as much work."""
        return Work(*(factor * value for value in self))


def work_of_batch(segment_ids: np.ndarray, labels: np.ndarray) -> Work:
    """Count the work of noised rows.

    Args:
        segment_ids: (B, T) int, 1, 2, ... for the documents of a row, 0 at padding.
        labels: (B, T) int, ``IGNORED_LABEL`` where nothing is scored.
    """
    pairs = sum(int((np.bincount(row)[1:].astype(np.int64) ** 2).sum()) for row in segment_ids)
    return Work(int((segment_ids > 0).sum()), pairs, int((labels != IGNORED_LABEL).sum()))


def forward_flops(shape: ModelShape, work: Work) -> dict[str, float]:
    """Operations of one forward pass by part: ``layers`` (projections and MLP), ``attention``, ``head``."""
    heads, key_values = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    per_token = shape.hidden_size * (2 * heads + 2 * key_values + 3 * shape.intermediate_size)  # q, o; k, v; MLP
    return {
        "layers": 2.0 * shape.num_hidden_layers * per_token * work.tokens,
        "attention": 2.0 * shape.num_hidden_layers * 2 * heads * work.attended_pairs,  # scores, then their values
        "head": 2.0 * shape.hidden_size * shape.vocab_size * work.scored,
    }


def training_flops(shape: ModelShape, work: Work) -> float:
    """Operations of forward and backward pass together."""
    return TRAINING_PASSES * sum(forward_flops(shape, work).values())


def chip_of_gpu(device_name: str) -> ChipName | None:
    """The chip that a CUDA device name states; None for one whose peak is not in the table, PCIe boards included."""
    if re.search(r"PCIe|NVL|MIG", device_name):
        return None
    match = re.search(r"\b(A100|H100|H200)\b", device_name)
    return match[1] if match else None  # type: ignore[return-value]
