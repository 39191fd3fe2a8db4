"""The arithmetic that training needs: one side of MFU; the other is `devices.chips`. Free of torch and of devices.

Counted are the multiply-adds of the matrix products that the objective asks for, two operations each: attention over
the pairs that see each other (all of a document in both directions, or those of its blocks), the head on scored
positions only, three times the forward pass for a training step. Rows by blocks hold each token twice, and both copies
go through the layers. Not counted: padding, recomputed activations, norms,
and work that a kernel does without need, such as pairs of different documents or logits of clean positions.
"""

from typing import NamedTuple, Protocol

import numpy as np

TRAINING_PASSES = 3  # forward, gradient by the activations, gradient by the weights: a matrix product each


class ModelShape(Protocol):
    """The fields of `CoDAConfig` that the count needs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


class BlockShape(Protocol):
    """What the count needs of `CoDALanguageModel.noise.Blocks`."""

    size: int

    @property
    def is_joint(self) -> bool:
        """Whether the clean copy attends causally."""


class Work(NamedTuple):
    """What a batch asks of the network."""

    tokens: float  # positions that hold a token
    attended_pairs: float  # (query, key) pairs: with full attention the sum of the squared lengths of all documents
    scored: float  # positions whose logits the loss needs

    def scaled(self, factor: float) -> "Work":
        """`factor` times as much work."""
        return Work(*(factor * value for value in self))


def pairs_of_document(length: int, block_size: int) -> int:
    """(query, key) pairs of a document whose positions see their block and those before it."""
    whole, rest = divmod(length, block_size)
    return block_size**2 * whole * (whole + 1) // 2 + rest * length


def doubled_pairs(length: int, blocks: BlockShape) -> int:
    """(query, key) pairs of both copies: a noisy block sees as many positions as its clean twin."""
    context = 1 if blocks.is_joint else blocks.size
    return pairs_of_document(length, blocks.size) + pairs_of_document(length, context)


def work_of_batch(segment_ids: np.ndarray, labels: np.ndarray, blocks: BlockShape | None = None) -> Work:
    """Count the work of noised rows.

    Args:
        segment_ids: (B, T) int, 1, 2, ... for the documents of a row, 0 at padding.
        labels: (B, T) int, negative where nothing is scored.
        blocks: of rows `[noisy; clean]`.
    """
    halves = segment_ids if blocks is None else segment_ids[:, : segment_ids.shape[1] // 2]
    lengths = [int(length) for row in halves for length in np.bincount(row)[1:]]
    pairs = sum(length**2 if blocks is None else doubled_pairs(length, blocks) for length in lengths)
    return Work(int((segment_ids > 0).sum()), pairs, int((labels >= 0).sum()))


def forward_flops(shape: ModelShape, work: Work) -> dict[str, float]:
    """Operations of one forward pass by part: `layers` (projections and MLP), `attention`, `head`."""
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
