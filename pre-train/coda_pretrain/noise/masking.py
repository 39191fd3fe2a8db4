"""Noise for one training batch: levels, S1/S2/S3 of the report, masked tokens, labels and weights, on the host.

Every draw is a pure function of (seed, sample id) or, for the noise levels, of (seed, step) and the row's place in the
global batch. A backend, mesh, number of hosts, micro-batching or restart therefore changes nothing, and one static
graph serves all steps. Not here: how often each strategy is applied at which point of a run
(``strategies``), and the mathematics of corruption (``CoDALanguageModel.diffusion``).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from CoDALanguageModel.diffusion import corrupt, named_rng, stratified_noise_levels

from ..data.mixture import Sample
from .strategies import MaskingConfig, MaskingProbabilities

__all__ = ["MaskingConfig", "MaskingProbabilities", "noise_batch", "noise_levels", "plan_row"]

IGNORED_LABEL = -100
ROWS_AT_ONCE = 4


class RowPlan(NamedTuple):
    """What the strategies do to one row."""

    prefix_length: int  # S1: the first positions that are never masked; 0 without S1
    kept_length: int  # S2: positions from here on become padding; T without S2
    span: int  # S3: length of the masked runs; 1 without S3


def plan_row(
    rng: np.random.Generator, num_real: int, seq_len: int, probabilities: MaskingProbabilities, spans: tuple[int, ...]
) -> RowPlan:
    """Draw S1, S2 and S3 for a row of ``seq_len`` positions, the first ``num_real`` of which hold tokens.

    The prefix has 1 to ``num_real - 1`` tokens, the kept part 2 to ``num_real - 1``, uniformly: at least one position
    is left to learn from. Rows of fewer than 3 tokens are too short for either and keep all. The four draws are always
    made, so that a probability does not change what another strategy draws.
    """
    strategy, place, spanned, choice = rng.random(4)
    prefix_length, kept_length = 0, seq_len
    if num_real >= 3:
        if strategy < probabilities.prefix:
            prefix_length = 1 + int(place * (num_real - 1))
        elif strategy < probabilities.prefix + probabilities.truncate:
            kept_length = 2 + int(place * (num_real - 2))
    span = spans[int(choice * len(spans))] if spanned < probabilities.span else 1
    return RowPlan(prefix_length, kept_length, span)


def segment_starts(segment_ids: np.ndarray) -> np.ndarray:
    """(B, T) bool: True at the first position of each segment, and of padding. ``segment_ids`` is (B, T) int."""
    starts = np.ones(segment_ids.shape, dtype=bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return starts


def segment_positions(segment_ids: np.ndarray) -> np.ndarray:
    """(B, T) int64: place of each token in its segment, from 0; 0 in padding."""
    places = np.arange(segment_ids.shape[1])[None, :]
    start_places = np.maximum.accumulate(np.where(segment_starts(segment_ids), places, 0), axis=1)
    return np.where(segment_ids > 0, places - start_places, 0).astype(np.int64)


def noise_levels(rows: Sequence[int], global_batch_size: int, *, seed: int, step: int, t_min: float) -> np.ndarray:
    """(len(rows),) float32 in [t_min, 1]: this process's part of the levels stratified over the global batch.

    The strata are dealt to the rows at random: in row order, one host would always hold the nearly clean rows and
    another the nearly masked ones, whose loss costs more.
    """
    rng = named_rng("noise-levels", seed, step)
    levels = stratified_noise_levels(global_batch_size, rng.random(), t_min=t_min)
    return np.asarray(levels, dtype=np.float32)[rng.permutation(global_batch_size)[np.asarray(rows)]]


def corrupt_rows(
    input_ids: np.ndarray,
    maskable: np.ndarray,
    t: np.ndarray,
    uniforms: np.ndarray,
    spans: np.ndarray,
    *,
    mask_token_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """``diffusion.corrupt`` a few rows at a time, so that what it needs in between stays small.

    Returns:
        The noised ids (B, T) int64 and where they are masked (B, T) bool.
    """
    noised_ids, masked = np.empty_like(input_ids), np.empty(input_ids.shape, dtype=bool)
    for start in range(0, len(input_ids), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        arrays = [torch.from_numpy(array[part]) for array in (input_ids, maskable, t, uniforms)]
        result = corrupt(*arrays, mask_token_id=mask_token_id, span=torch.from_numpy(spans[part]))
        noised_ids[part], masked[part] = result.noised_ids.numpy(), result.masked.numpy()
    return noised_ids, masked


def noise_batch(
    samples: Sequence[Sample],
    sample_ids: Sequence[int],
    *,
    config: MaskingConfig,
    seed: int,
    step: int,
    progress: float,
    epoch: int,
    rows: Sequence[int],
    global_batch_size: int,
    mask_token_id: int,
    pad_token_id: int,
) -> dict[str, np.ndarray]:
    """Noise the rows that this process feeds into one step. B is ``len(rows)`` below.

    Padding and the first position of each segment are never masked: the model has no output that scores them. Every
    other position outside an S1 prefix is masked with probability exactly t, whatever its neighbours and the span.

    Args:
        samples: the clean rows, all of one length T.
        sample_ids: number of each sample in the run (an epoch's repetition has another number, so another noise).
        config: levels and strategies.
        seed: names the noise.
        step: number of the step, from 0; with ``seed`` it names the noise levels.
        progress: finished share of the run's steps, in [0, 1].
        epoch: number of the epoch, from 0.
        rows: places of these rows in the global batch.
        global_batch_size: rows of the step over all processes and micro-batches.
        mask_token_id: id that replaces a masked token.
        pad_token_id: id at padding, that of S2 included.

    Returns:
        ``noised_ids`` (B, T) int64; ``labels`` (B, T) int64, the clean id where masked and -100 elsewhere;
        ``loss_weights`` (B,) float32, ``1 / (t * global_batch_size * T)``; ``position_ids`` (B, T) int64, from 0 in
        each segment; ``segment_ids`` (B, T) int64, 0 at padding; ``t`` (B,) float32.

        The sum of weighted cross-entropies over all processes and micro-batches is the loss of the report (equation 6,
        weight 1/t over B * T of the global batch): its denominator is a constant, so parts add up without
        communication, and S2's padding makes a row count less rather than the other tokens more.

    Raises:
        ValueError: the numbers of samples, ids and rows differ, or ``rows`` is not inside the global batch.
    """
    if not len(samples) == len(sample_ids) == len(rows):
        raise ValueError(
            f"samples, sample_ids and rows must be equally many, got {len(samples)}, {len(sample_ids)}, {len(rows)}"
        )
    if len(set(rows)) != len(rows) or not 0 <= min(rows) <= max(rows) < global_batch_size:
        raise ValueError(f"rows must be a part of range(global_batch_size = {global_batch_size}), got {rows}")
    input_ids = np.stack([sample.input_ids for sample in samples]).astype(np.int64)
    segment_ids = np.stack([sample.segment_ids for sample in samples]).astype(np.int64)
    num_rows, seq_len = input_ids.shape
    probabilities = config.at(progress, epoch)
    max_span = max(config.span_lengths)  # also where no row has a span: the shape must not depend on the draw
    uniforms = np.empty((num_rows, seq_len + max_span - 1), dtype=np.float32)
    maskable = np.ones((num_rows, seq_len), dtype=bool)
    spans = np.ones(num_rows, dtype=np.int64)
    for row, sample_id in enumerate(sample_ids):
        rng = named_rng("noise", seed, sample_id)
        num_real = int((segment_ids[row] > 0).sum())
        plan = plan_row(rng, num_real, seq_len, probabilities, config.span_lengths)
        uniforms[row] = rng.random(seq_len + max_span - 1, dtype=np.float32)
        segment_ids[row, plan.kept_length :] = 0
        maskable[row, : plan.prefix_length] = False
        spans[row] = plan.span
    real = segment_ids > 0
    input_ids[~real] = pad_token_id
    maskable &= real & ~segment_starts(segment_ids)
    t = noise_levels(rows, global_batch_size, seed=seed, step=step, t_min=config.t_min)
    noised_ids, masked = corrupt_rows(input_ids, maskable, t, uniforms, spans, mask_token_id=mask_token_id)
    return {
        "noised_ids": noised_ids,
        "labels": np.where(masked, input_ids, IGNORED_LABEL),
        "loss_weights": (1.0 / (t.astype(np.float64) * global_batch_size * seq_len)).astype(np.float32),
        "position_ids": segment_positions(segment_ids),
        "segment_ids": segment_ids,
        "t": t,
    }
