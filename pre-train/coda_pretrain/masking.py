"""Noise for one training batch: levels, S1/S2/S3 of the report, masked tokens, labels and weights, on the host.

Every draw is a pure function of (seed, sample id) or, for the noise levels, of (seed, step) and the row's place in the
global batch. A backend, mesh, number of hosts, micro-batching or restart therefore changes nothing, and one static
graph serves all steps. Not here: the mathematics of corruption (``CoDALanguageModel.diffusion``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from CoDALanguageModel.diffusion import corrupt, named_rng, stratified_noise_levels

from .mixture import Sample

IGNORED_LABEL = -100


class MaskingProbabilities(NamedTuple):
    """Shares of the rows that each strategy of the report (section 4.1) is applied to, in [0, 1]."""

    prefix: float  # S1: a random prefix is never masked
    truncate: float  # S2: a random suffix is replaced by padding that is never masked
    span: float  # S3: tokens are masked in runs


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How rows are noised, and how the strategies' probabilities move over a run.

    S1 and S2 exclude each other in a row; S3 is drawn independently of both.
    """

    schedule: Literal["constant", "linear", "per_epoch"] = "constant"
    """``constant``: the three probabilities below. ``linear``: from them at the start of the run to ``linear_end`` at
    its end. ``per_epoch``: the rows of ``per_epoch``, one an epoch, the last one for all later epochs."""

    prefix_probability: float = 0.0
    """S1: share of rows with a random prefix that is never masked."""

    truncate_probability: float = 0.0
    """S2: share of rows whose random suffix is replaced by padding."""

    span_probability: float = 0.0
    """S3: share of rows masked in runs."""

    linear_end: tuple[float, float, float] | None = None
    """(S1, S2, S3) at the end of the run; only with ``schedule: linear``."""

    per_epoch: tuple[tuple[float, float, float], ...] = ()
    """(S1, S2, S3) of each epoch; only with ``schedule: per_epoch``, which leaves the probabilities above at 0."""

    span_lengths: tuple[int, ...] = (2, 4, 8)
    """S3: run lengths k in tokens, each equally likely."""

    t_min: float = 1e-3
    """The smallest noise level drawn; the largest loss weight is its inverse."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a probability outside [0, 1], S1 and S2 together above 1, a value that the chosen schedule does
                not use, or one that it needs and does not have.
        """
        if self.linear_end is not None:
            object.__setattr__(self, "linear_end", tuple(self.linear_end))
        object.__setattr__(self, "per_epoch", tuple(tuple(row) for row in self.per_epoch))
        object.__setattr__(self, "span_lengths", tuple(self.span_lengths))
        if self.schedule not in ("constant", "linear", "per_epoch"):
            raise ValueError(f"masking.schedule must be constant, linear or per_epoch, got {self.schedule!r}")
        if (self.linear_end is not None) != (self.schedule == "linear"):
            raise ValueError(
                "masking.linear_end must be given with masking.schedule linear and only with it, "
                f"got schedule {self.schedule!r} and linear_end {self.linear_end}"
            )
        if bool(self.per_epoch) != (self.schedule == "per_epoch"):
            raise ValueError(
                "masking.per_epoch must be given with masking.schedule per_epoch and only with it, "
                f"got schedule {self.schedule!r} and per_epoch {self.per_epoch}"
            )
        start = (self.prefix_probability, self.truncate_probability, self.span_probability)
        if self.schedule == "per_epoch" and any(start):
            raise ValueError(
                "masking.prefix_probability, truncate_probability and span_probability have no effect with "
                f"masking.schedule per_epoch, leave them out; got {start}"
            )
        check_probabilities("prefix_probability, truncate_probability, span_probability", start)
        if self.linear_end is not None:
            check_probabilities("linear_end", self.linear_end)
        for epoch, row in enumerate(self.per_epoch):
            check_probabilities(f"per_epoch[{epoch}]", row)
        if not self.span_lengths or min(self.span_lengths) < 1:
            raise ValueError(f"masking.span_lengths must list lengths of at least 1, got {self.span_lengths}")
        if not 0 < self.t_min < 1:
            raise ValueError(f"masking.t_min must be in (0, 1), got {self.t_min}")

    def at(self, progress: float, epoch: int) -> MaskingProbabilities:
        """The probabilities at a point of the run.

        Args:
            progress: finished share of the run's steps, in [0, 1].
            epoch: number of the epoch, from 0.
        """
        if self.schedule == "per_epoch":
            return MaskingProbabilities(*self.per_epoch[min(epoch, len(self.per_epoch) - 1)])
        start = (self.prefix_probability, self.truncate_probability, self.span_probability)
        if self.linear_end is None:
            return MaskingProbabilities(*start)
        return MaskingProbabilities(*(a + (b - a) * progress for a, b in zip(start, self.linear_end, strict=True)))


def check_probabilities(name: str, values: Sequence[float]) -> None:
    """Check one (S1, S2, S3).

    Raises:
        ValueError: not three numbers in [0, 1], or S1 + S2 above 1 (a row can have only one of them).
    """
    if len(values) != 3 or not all(0.0 <= value <= 1.0 for value in values):
        raise ValueError(f"masking.{name} must be three probabilities (S1, S2, S3) in [0, 1], got {tuple(values)}")
    if values[0] + values[1] > 1.0:
        raise ValueError(f"masking.{name}: S1 and S2 exclude each other, so S1 + S2 must be <= 1, got {tuple(values)}")


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


def noise_levels(rows: range, global_batch_size: int, *, seed: int, step: int, t_min: float) -> np.ndarray:
    """(len(rows),) float32 in [t_min, 1]: this process's part of the levels stratified over the global batch.

    The strata are dealt to the rows at random: in row order, one host would always hold the nearly clean rows and
    another the nearly masked ones, whose loss costs more.
    """
    rng = named_rng("noise-levels", seed, step)
    levels = stratified_noise_levels(global_batch_size, rng.random(), t_min=t_min)
    return np.asarray(levels, dtype=np.float32)[rng.permutation(global_batch_size)[rows.start : rows.stop]]


def noise_batch(
    samples: Sequence[Sample],
    sample_ids: Sequence[int],
    *,
    config: MaskingConfig,
    seed: int,
    step: int,
    progress: float,
    epoch: int,
    rows: range,
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
    if rows.step != 1 or not 0 <= rows.start < rows.stop <= global_batch_size:
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
    noised_ids, masked = corrupt(
        torch.from_numpy(input_ids),
        torch.from_numpy(maskable),
        torch.from_numpy(t),
        torch.from_numpy(uniforms),
        mask_token_id=mask_token_id,
        span=torch.from_numpy(spans),
    )
    return {
        "noised_ids": noised_ids.numpy(),
        "labels": np.where(masked.numpy(), input_ids, IGNORED_LABEL),
        "loss_weights": (1.0 / (t.astype(np.float64) * global_batch_size * seq_len)).astype(np.float32),
        "position_ids": segment_positions(segment_ids),
        "segment_ids": segment_ids,
        "t": t,
    }
