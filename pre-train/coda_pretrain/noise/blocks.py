"""Training by blocks: settings, and how the block grows over a run.

Free of torch, so that a configuration is checked in a moment. Not here: the rows themselves
(`CoDALanguageModel.noise.noise_blocks`), and the block size that a run ends with, which is the model's.
"""

import math
from dataclasses import dataclass

from CoDALanguageModel.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """How rows are noised by blocks; with `objective` `block` and `joint`."""

    complementary: bool = False
    """Each row goes through the model twice, the second time with those tokens masked that the first time were not:
    each token is a target exactly once. A step then holds twice `global_batch_size` rows."""

    autoregressive_weight: float | None = None
    """`joint` alone, which needs it: weight of the cross-entropy of the next token on the clean copy."""

    growth_steps: int | None = None
    """Steps in which the block grows from one token to the model's `block_size`, by doubling; null is the model's from
    the first step on. With shifted logits the first step's loss is the autoregressive one."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UserError: one is out of its range.
        """
        weight = self.autoregressive_weight
        if weight is not None and not 0.0 < weight < math.inf:
            raise UserError(f"blocks.autoregressive_weight must be a finite number > 0, got {weight}")
        if self.growth_steps is not None and self.growth_steps < 1:
            raise UserError(f"blocks.growth_steps must be >= 1, got {self.growth_steps}")

    def size_at(self, step: int, block_size: int) -> int:
        """Tokens per block at a step.

        Args:
            step: from 0.
            block_size: the model's.
        """
        if self.growth_steps is None or step >= self.growth_steps:
            return block_size
        return 2 ** (step * (block_size.bit_length() - 1) // self.growth_steps)

    def check_growth(self, block_size: int) -> None:
        """Check the growth against the model's `block_size`.

        Raises:
            UserError: doubling does not lead from 1 to it, or has too few steps for all sizes.
        """
        if self.growth_steps is None:
            return
        if block_size & (block_size - 1):
            raise UserError(
                "blocks.growth_steps doubles the block from 1 on, so each size must divide the next: it needs a model "
                f"whose block_size is a power of two, got block_size {block_size}"
            )
        sizes = block_size.bit_length() - 1
        if self.growth_steps < sizes:
            raise UserError(
                f"blocks.growth_steps must be at least {sizes}, one step for each size below the model's block_size "
                f"{block_size}, got {self.growth_steps}"
            )
