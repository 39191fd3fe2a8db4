"""The rows of a step, noised: what both trainers, validation and pictures do to clean rows.

The caller deals the noise levels; every other draw is a pure function of (seed, sample id). Processes, micro-batches,
padding, company and restarts therefore change nothing. Not here: how often a strategy is applied at which point of a
run, conditioning and tails (the training rooms), the forward process itself (`diffusion.corrupt`), loss weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .attention_coda import Visibility, block_starts, doubled, places, run_starts
from .diffusion import IGNORE_INDEX, corrupt, named_rng, scored_by, stratified_noise_levels
from .errors import UserError

ROWS_AT_ONCE = 4
"""Rows that are corrupted at a time, so that what is needed in between stays small."""


def deal_levels(seed: int, step: int, num_rows: int, t_min: float) -> Tensor:
    """Noise levels of all rows of a step, stratified over them, (num_rows,) float32 in [t_min, 1].

    The strata are dealt to the rows at random: in row order, one process would always hold the nearly clean rows and
    another the nearly masked ones, whose loss costs more.
    """
    rng = named_rng("noise-levels", seed, step)
    levels = stratified_noise_levels(num_rows, rng.random(), t_min=t_min)
    return torch.from_numpy(levels[rng.permutation(num_rows)])


class RowPlan(NamedTuple):
    """What the strategies of the report (section 4.1) do to one row."""

    prefix_length: int
    """S1: the first positions that are never masked; 0 without S1."""

    kept_length: int
    """S2: positions from here on become padding; T without S2."""

    span: int
    """S3: length of the masked runs; 1 without S3."""


def plan_row(
    rng: np.random.Generator,
    num_real: int,
    seq_len: int,
    strategies: tuple[float, float, float],
    span_lengths: Sequence[int],
) -> RowPlan:
    """Draw S1, S2 and S3 for a row of `seq_len` positions, the first `num_real` of which hold tokens.

    The prefix has 1 to `num_real - 1` tokens, the kept part 2 to `num_real - 1`, uniformly: at least one position is
    left to learn from. Rows of fewer than 3 tokens are too short for either and keep all. The four draws are always
    made, so that a probability does not change what another strategy draws.

    Args:
        rng: the row's own generator.
        num_real: tokens of the row.
        seq_len: T.
        strategies: probabilities of S1, S2 (which exclude each other) and S3.
        span_lengths: S3: run lengths in tokens, each equally likely.
    """
    prefix, truncate, span = strategies
    strategy, place, spanned, choice = rng.random(4)
    prefix_length, kept_length = 0, seq_len
    if num_real >= 3:
        if strategy < prefix:
            prefix_length = 1 + int(place * (num_real - 1))
        elif strategy < prefix + truncate:
            kept_length = 2 + int(place * (num_real - 2))
    return RowPlan(prefix_length, kept_length, span_lengths[int(choice * len(span_lengths))] if spanned < span else 1)


class DrawnRows(NamedTuple):
    """The draws of a batch of rows, of which each depends on its own seed and sample id alone."""

    prefix_lengths: Tensor
    """(B,) int64, see `RowPlan`."""

    kept_lengths: Tensor
    """(B,) int64."""

    spans: Tensor
    """(B,) int64."""

    uniforms: Tensor
    """(B, T + K - 1) float32, K the longest span that could be drawn; a wider row draws more of the same stream."""

    def to(self, device: torch.device) -> "DrawnRows":
        """The same on another device."""
        return DrawnRows(*(x.to(device) for x in self))


def draw_rows(
    seed: int,
    sample_ids: Sequence[int],
    num_real: Sequence[int],
    seq_len: int,
    *,
    strategies: tuple[float, float, float] = (0.0, 0.0, 0.0),
    span_lengths: Sequence[int] = (1,),
) -> DrawnRows:
    """Draw what the noise of some rows needs besides their levels.

    Args:
        seed: names the noise.
        sample_ids: number of each sample in the run (an epoch's repetition has another number, so another noise).
        num_real: tokens of each row.
        seq_len: T.
        strategies: see `plan_row`.
        span_lengths: see `plan_row`.
    """
    width = seq_len + max(span_lengths) - 1  # also where no row has a span: the shape must not depend on the draw
    plans, uniforms = [], np.empty((len(sample_ids), width), dtype=np.float32)
    for row, (sample_id, tokens) in enumerate(zip(sample_ids, num_real, strict=True)):
        rng = named_rng("noise", seed, sample_id)
        plans.append(plan_row(rng, tokens, seq_len, strategies, span_lengths))
        uniforms[row] = rng.random(width, dtype=np.float32)
    lengths = torch.tensor(plans, dtype=torch.int64).reshape(-1, 3)
    return DrawnRows(*lengths.unbind(dim=1), torch.from_numpy(uniforms))


class CleanRows(NamedTuple):
    """Rows as they come from the data."""

    input_ids: Tensor
    """(B, T) int64."""

    segment_ids: Tensor
    """(B, T) int, 0 at padding and 1, 2, ... for documents that do not see each other."""

    fixed: Tensor | None = None
    """(B, T) bool, positions that are never masked, such as a prompt; by default none."""

    answer_start: Tensor | None = None
    """(B, 1) or (B, T) int64, place in its text where a block must begin, of rows that are noised by blocks whose
    `block_origin` is the answer; by default blocks are counted from the start of each text."""


class NoisedRows(NamedTuple):
    """Rows as the model is given them."""

    noised_ids: Tensor
    """(B, T) int64."""

    labels: Tensor
    """(B, T) int64, the clean token where masked, `IGNORE_INDEX` elsewhere."""

    segment_ids: Tensor
    """(B, T) int, 0 at padding, that of S2 included."""

    maskable: Tensor
    """(B, T) bool, positions that were masked with probability t."""


def noise_rows(
    rows: CleanRows, t: Tensor, drawn: DrawnRows, *, mask_token_id: int, pad_token_id: int, logits_shift: bool = True
) -> NoisedRows:
    """Mask what may be masked, each position with probability t, whatever its neighbours and the span.

    Never masked are padding, an S1 prefix, fixed positions, and what no row of the logits scores, such as the first
    position of each segment (see `diffusion.scored_by`).

    Args:
        rows: the clean rows.
        t: (B,) float32 in (0, 1], the noise level of each row; or (B, T), of each position.
        drawn: see `draw_rows`.
        mask_token_id: replaces a masked token.
        pad_token_id: put at padding, that of S2 included.
        logits_shift: of the model's configuration.

    Raises:
        ValueError: a shape does not fit `rows`.
    """
    index = torch.arange(rows.input_ids.shape[1], device=rows.input_ids.device)
    segment_ids = rows.segment_ids.masked_fill(index >= drawn.kept_lengths[:, None], 0)
    input_ids = rows.input_ids.masked_fill(segment_ids == 0, pad_token_id)
    maskable = (scored_by(None, segment_ids, shift=logits_shift) >= 0) & (index >= drawn.prefix_lengths[:, None])
    if rows.fixed is not None:
        maskable &= ~rows.fixed
    noised_ids, masked = torch.empty_like(input_ids), torch.empty_like(maskable)
    arrays = (input_ids, maskable, t, drawn.uniforms, drawn.spans)
    for start in range(0, len(input_ids), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        *arguments, spans = (x[part] for x in arrays)
        noised_ids[part], masked[part] = corrupt(*arguments, mask_token_id=mask_token_id, span=spans)
    return NoisedRows(noised_ids, input_ids.masked_fill(~masked, IGNORE_INDEX), segment_ids, maskable)


GOLDEN = (5**0.5 - 1) / 2


class Blocks(NamedTuple):
    """How rows are noised by blocks (Arriola et al. 2025, https://arxiv.org/abs/2503.09573)."""

    size: int
    """Tokens per block."""

    complementary: bool = False
    """Every row comes twice, the second time with those positions masked that the first time were not, so that each
    token is a target exactly once (Wu et al. 2025, https://arxiv.org/abs/2509.26328)."""

    autoregressive_weight: float | None = None
    """Objective `joint`: weight of the cross-entropy of the next token on the clean half, which then attends causally.
    0 leaves out the loss alone; None is objective `block`, whose clean half attends by blocks."""

    @property
    def is_joint(self) -> bool:
        """Whether the clean half attends causally."""
        return self.autoregressive_weight is not None


def blocks_to_train(
    model: PreTrainedConfig, *, complementary: bool = False, autoregressive_weight: float | None = None
) -> Blocks:
    """The blocks that a model with attention by blocks is trained with.

    An autoregressive loss makes a causal context a fact of its configuration: it must be decoded behind such a one too.
    A model that has one already keeps it without that loss.

    Args:
        model: configuration of the model.
        complementary: see `Blocks`.
        autoregressive_weight: objective `joint`: weight of the next token's cross-entropy; None for objective `block`.

    Raises:
        UserError: an autoregressive loss without shifted logits.
    """
    if autoregressive_weight is None:
        autoregressive_weight = 0.0 if model.causal_context else None
    elif not model.logits_shift:
        raise UserError(
            "objective 'joint' needs a model with logits_shift true: without it no row scores the token after it, and "
            "the clean half has nothing to learn; take objective 'block'"
        )
    else:
        model.causal_context = True
    return Blocks(model.block_size, complementary, autoregressive_weight)


def spread_levels(
    t: Tensor, segment_ids: Tensor, blocks: Blocks, *, t_min: float, answer_start: Tensor | None = None
) -> Tensor:
    """Give each block a noise level of its own, (B, T) float32, from one level per row.

    Block n of a row, counted over all its texts, is n golden sections further round the interval than the row. Each
    level is therefore uniform, which is all that an unbiased loss asks for, since a block sees no other noisy one; the
    blocks of a row are evenly spread however many they are (a Kronecker sequence), and if the levels of the rows are
    stratified, so are those of their n-th blocks.

    Args:
        t: (B,) float32, levels of the rows, uniform on [t_min, 1], as `deal_levels` gives them.
        segment_ids: (B, T) int, 0 at padding.
        blocks: with complementary masks, whose levels are t and 1 - t, the interval is [t_min, 1 - t_min].
        t_min: the smallest level.
        answer_start: see `attention_coda.block_numbers`.
    """
    start = block_starts(places(segment_ids), blocks.size, answer_start)
    number = (run_starts(segment_ids) | run_starts(start)).cumsum(dim=1) - 1
    t_max = 1.0 - t_min if blocks.complementary else 1.0
    u = ((t.double() - t_min) / (1.0 - t_min))[:, None]
    return (t_min + (t_max - t_min) * ((u + GOLDEN * number) % 1.0)).float()


class DoubledRows(NamedTuple):
    """Rows `[noisy; clean]` as the model is given them: B' is B, or 2 B with complementary masks.

    The two of a pair stand next to each other.
    """

    input_ids: Tensor
    """(B', 2 T) int64."""

    position_ids: Tensor
    """(B', 2 T) int64, place of each token in its text, the same in both halves."""

    visibility: Visibility
    """(B', 2 T), segments and rule."""

    labels: Tensor
    """(B', T) int64, the clean token where masked; (B', 2 T) with an autoregressive loss on the clean half."""

    weights: Tensor
    """The shape of `labels`, float32: the cross-entropies summed with these weights are the bound of all rows in nats,
    the autoregressive loss added; the denominator is the caller's."""

    maskable: Tensor
    """(B', T) bool, see `NoisedRows`."""


def noise_blocks(
    rows: CleanRows,
    t: Tensor,
    drawn: DrawnRows,
    blocks: Blocks,
    *,
    mask_token_id: int,
    pad_token_id: int,
    logits_shift: bool = True,
) -> DoubledRows:
    """Noise rows as `noise_rows` does, for a model that attends by blocks: a noisy copy beside the clean one.

    A block of one token has the same cross-entropy at every level. There t is 1 (with complementary masks 1/2),
    whatever is given: with shifted logits the loss is then exactly the autoregressive one.

    Args:
        rows: the clean rows; blocks are counted from the start of each segment, or from `rows.answer_start`.
        t: (B, T) float32 in (0, 1], equal within a block, see `spread_levels`; or (B,) for one level per row.
        drawn: see `draw_rows`.
        blocks: see `Blocks`.
        mask_token_id: replaces a masked token.
        pad_token_id: put at padding, that of S2 included.
        logits_shift: of the model's configuration.

    Raises:
        ValueError: a shape does not fit `rows`.
    """
    assert logits_shift or not blocks.autoregressive_weight, "`blocks_to_train` refuses it"
    if blocks.size == 1:
        t = torch.full_like(t, 0.5 if blocks.complementary else 1.0)
    tokens = {"mask_token_id": mask_token_id, "pad_token_id": pad_token_id, "logits_shift": logits_shift}
    noised_ids, labels, segment_ids, maskable = noise_rows(rows, t, drawn, **tokens)
    masked = labels != IGNORE_INDEX
    clean_ids = torch.where(masked, labels, noised_ids)
    weights = (1.0 / (t[:, None] if t.ndim == 1 else t).double()).expand(labels.shape)
    autoregressive_weight = blocks.autoregressive_weight or 0.0
    place = places(segment_ids)
    start = block_starts(place, blocks.size, rows.answer_start)
    if blocks.complementary:
        rest = maskable & ~masked
        noised_ids = _paired(noised_ids, clean_ids.masked_fill(rest, mask_token_id))
        labels = _paired(labels, clean_ids.masked_fill(~rest, IGNORE_INDEX))
        # Each of the two is an unbiased estimate alone, so the pair is their mean. Where t is 1 nothing is left.
        weights = _paired(weights / 2, torch.where(rest, 0.5 / (1.0 - 1.0 / weights), 0.0))
        autoregressive_weight /= 2
        clean_ids, segment_ids, place, start, maskable = (
            _paired(x, x) for x in (clean_ids, segment_ids, place, start, maskable)
        )
    if autoregressive_weight:
        labels = torch.cat([labels, clean_ids.masked_fill(~maskable, IGNORE_INDEX)], dim=1)
        weights = torch.cat([weights, torch.full_like(weights, autoregressive_weight)], dim=1)
    return DoubledRows(
        torch.cat([noised_ids, clean_ids], dim=1),
        torch.cat([place, place], dim=1).masked_fill(torch.cat([segment_ids, segment_ids], dim=1) == 0, 0),
        doubled(segment_ids, place, start, causal_context=blocks.is_joint),
        labels,
        weights.float(),
        maskable,
    )


def _paired(first: Tensor, second: Tensor) -> Tensor:
    """Rows of both, one of each by turns."""
    return torch.stack([first, second], dim=1).flatten(0, 1)
