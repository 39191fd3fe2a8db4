"""How many tokens each step of a row commits. Not here: which ones (`orders`)."""

import math
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
def plan_commits(
    num_masked: int, *, steps: int, block_length: int | None, eps: float, keeps_deciding: bool
) -> tuple[Commit, ...]:
    """Plan all forward passes of one row; those that would change nothing are left out.

    Masked tokens are taken in blocks of `block_length` from left to right, the steps shared out evenly, the first
    blocks getting one more where they do not divide.

    Args:
        num_masked: masked tokens of the row.
        steps: denoising steps for the row. A block takes at most as many as it has masks, or `MOST_STEPS` if that is
            more, so that neither time nor memory grows with a number that a client may choose.
        block_length: masked tokens per block; None decodes all at once.
        eps: last time of the schedule.
        keeps_deciding: whether the order decides all tokens of a block anew at each step; see `orders.Order`.

    Raises:
        UserError: there are more blocks than steps.
    """
    if num_masked == 0:
        return ()
    length = min(block_length or num_masked, num_masked)
    num_blocks = math.ceil(num_masked / length)
    if steps < num_blocks:
        raise UserError(
            f"steps must be at least the number of blocks: {num_masked} masked tokens in blocks of "
            f"block_length={block_length} are {num_blocks} blocks, got steps={steps}"
        )
    plan, first_step = [], 0
    for block in range(num_blocks):
        size = min(length, num_masked - block * length)
        block_steps = min(steps // num_blocks + (block < steps % num_blocks), max(size, MOST_STEPS))
        if keeps_deciding:  # kept after step i: size - floor(size * (1 - (i + 1) / steps)), in integers
            kept = [size - size * (block_steps - i - 1) // block_steps for i in range(block_steps)]
            counts = [k if k > previous else 0 for previous, k in zip([0, *kept], kept, strict=False)]
        else:
            counts = commit_counts(size, block_steps, eps)
        plan += [Commit(first_step + i, block, count) for i, count in enumerate(counts) if count]
        first_step += block_steps
    return tuple(plan)
