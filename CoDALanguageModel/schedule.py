"""How many tokens each step of a row commits. Not here: which ones (`orders`)."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from .errors import UserError

MOST_STEPS = 512
"""More steps than this, and than there are masks, change nothing in a block. The published schedule then commits one
token a step as long as `steps * eps` is about 1/2, and beyond it leaves more and more tokens to its last step."""


class Commit(NamedTuple):
    """What one forward pass does to a row."""

    step: int
    """Index of the denoising step; names the random draws of the row."""

    block: int
    """Block of the row that is being decoded."""

    count: int
    """Tokens to commit; for an order that keeps deciding those of the block that stay committed after the step."""


@lru_cache(maxsize=64)
def commit_counts(num_masked: int, steps: int, eps: float) -> tuple[int, ...]:
    """Tokens to commit at each of `steps` steps, in the published schedule.

    Times fall linearly from 1 to `eps`; step i commits `floor(masked * (1 - t[i+1] / t[i]))` tokens in float32 and the
    last step commits the rest (Dream's sampler, https://github.com/HKUNLP/Dream, which CoDA uses).

    Returns:
        `steps` counts that sum to `num_masked`; some may be zero.
    """
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float32)
    fractions = (1 - times[1:] / times[:-1]).numpy()
    counts, left = [], num_masked
    for fraction in fractions[:-1]:
        counts.append(int(np.float32(left) * fraction))
        left -= counts[-1]
    return (*counts, left)


@lru_cache(maxsize=64)
def even_counts(num_masked: int, steps: int) -> tuple[int, ...]:
    """Tokens to commit at each of `steps` steps, as equal as may be, the first steps one more; some may be zero.

    LLaDA's schedule (Nie et al. 2025, https://arxiv.org/abs/2502.09992).
    """
    least, more = divmod(num_masked, steps)
    return (least + 1,) * more + (least,) * (steps - more)


@lru_cache(maxsize=64)
def kept_counts(size: int, steps: int) -> tuple[int, ...]:
    """Tokens that stay committed after each step, for an order that keeps deciding; 0 where it would keep no more."""
    # size - floor(size * (1 - (i + 1) / steps)), in integers
    kept = [size - size * (steps - i - 1) // steps for i in range(steps)]
    return tuple(k if k > previous else 0 for previous, k in zip([0, *kept], kept, strict=False))


def plan_commits(
    sizes: Sequence[int], *, steps: int, eps: float, keeps_deciding: bool, schedule: str = "published"
) -> Iterator[tuple[Commit, ...]]:
    """Plan the forward passes of one row, block by block; those that would change nothing are left out.

    The steps are shared out evenly, the first blocks getting one more where they do not divide.

    Args:
        sizes: masked tokens of each block, in the order in which the blocks are decoded.
        steps: denoising steps for the row. A block takes at most as many as it has masks, or `MOST_STEPS` if that is
            more, so that neither time nor memory grows with a number that a client may choose.
        eps: last time of the published schedule.
        keeps_deciding: whether the order decides all tokens of a block anew at each step; see `orders.Order`. Then as
            many more are kept after each.
        schedule: `published` or `even`.

    Returns:
        The commits of each block, planned when they are asked for: an answer that ends early is not planned further.

    Raises:
        UserError: there are more blocks than steps.
    """
    num_blocks = len(sizes)
    if steps < num_blocks:
        raise UserError(
            f"steps must be at least the number of blocks: {sum(sizes)} masked tokens in blocks of "
            f"block_length={max(sizes)} are {num_blocks} blocks, got steps={steps}"
        )

    def plan() -> Iterator[tuple[Commit, ...]]:
        first_step = 0
        for block, size in enumerate(sizes):
            block_steps = min(steps // num_blocks + (block < steps % num_blocks), max(size, MOST_STEPS))
            if keeps_deciding:
                counts = kept_counts(size, block_steps)
            elif schedule == "even":
                counts = even_counts(size, block_steps)
            else:
                counts = commit_counts(size, block_steps, eps)
            yield tuple(Commit(first_step + i, block, count) for i, count in enumerate(counts) if count)
            first_step += block_steps

    return plan()
