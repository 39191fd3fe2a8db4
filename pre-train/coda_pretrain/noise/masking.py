"""Packed samples of the shards, noised: what training, validation and pictures ask `CoDALanguageModel.noise` for.

Not here: how often each strategy is applied at which point of a run (`strategies`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from CoDALanguageModel.noise import (
    Blocks,
    CleanRows,
    DoubledRows,
    DrawnRows,
    NoisedRows,
    draw_rows,
    noise_blocks,
    noise_rows,
    spread_levels,
)

from ..data.mixture import Sample
from .strategies import MaskingProbabilities


class TokenFacts(NamedTuple):
    """What the noise needs to know of the model."""

    mask_token_id: int  # replaces a masked token
    pad_token_id: int  # at padding, that of S2 included
    logits_shift: bool = True  # see `CoDAConfig`


def noise_samples(
    samples: Sequence[Sample],
    sample_ids: Sequence[int],
    t: Tensor,
    *,
    seed: int,
    strategies: MaskingProbabilities,
    span_lengths: Sequence[int],
    tokens: TokenFacts,
) -> NoisedRows:
    """Noise some rows, for a model of full attention.

    Args:
        samples: the clean rows, all of one length T.
        sample_ids: number of each sample in the run (an epoch's repetition has another number, so another noise).
        t: (B,) float32, the noise level of each row.
        seed: names the noise.
        strategies: probabilities of S1, S2 and S3.
        span_lengths: S3: run lengths.
        tokens: ids that are put in, and whether logits are shifted.

    Raises:
        ValueError: the numbers of samples, ids and levels differ.
    """
    rows, drawn = _draw(samples, sample_ids, t, seed, strategies, span_lengths)
    return noise_rows(rows, t, drawn, **tokens._asdict())


def noise_samples_by_blocks(
    samples: Sequence[Sample],
    sample_ids: Sequence[int],
    t: Tensor,
    *,
    blocks: Blocks,
    t_min: float | None,
    seed: int,
    strategies: MaskingProbabilities,
    span_lengths: Sequence[int],
    tokens: TokenFacts,
) -> DoubledRows:
    """Noise some rows as `noise_samples` does, for a model that attends by `blocks`.

    With `t_min` each block gets a level of its own, from there on (`spread_levels`); without, it keeps that of its row.
    """
    rows, drawn = _draw(samples, sample_ids, t, seed, strategies, span_lengths)
    levels = t if t_min is None else spread_levels(t, rows.segment_ids, blocks, t_min=t_min)
    return noise_blocks(rows, levels, drawn, blocks, **tokens._asdict())


def _draw(
    samples: Sequence[Sample],
    sample_ids: Sequence[int],
    t: Tensor,
    seed: int,
    strategies: MaskingProbabilities,
    span_lengths: Sequence[int],
) -> tuple[CleanRows, DrawnRows]:
    if not len(samples) == len(sample_ids) == len(t):
        raise ValueError(
            f"samples, sample_ids and t must be equally many, got {len(samples)}, {len(sample_ids)}, {len(t)}"
        )
    input_ids, segment_ids = (
        torch.from_numpy(np.stack(arrays).astype(np.int64)) for arrays in zip(*samples, strict=True)
    )
    num_real = (segment_ids > 0).sum(dim=1).tolist()
    drawn = draw_rows(seed, sample_ids, num_real, input_ids.shape[1], strategies=strategies, span_lengths=span_lengths)
    return CleanRows(input_ids, segment_ids), drawn
