"""What is noised, when, and how strongly: pure functions of the step and of named seeds.

Inside: per-epoch lists, conditioned-span annealing, tails behind the answer. Not here: how rows are noised
(`CoDALanguageModel.noise`), LLaMA-Factory (`trainer`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from CoDALanguageModel.diffusion import named_rng
from CoDALanguageModel.noise import (
    Blocks,
    CleanRows,
    DoubledRows,
    NoisedRows,
    draw_rows,
    noise_blocks,
    noise_rows,
    spread_levels,
)


def epoch_value(values: Sequence[float], epoch: int) -> float:
    """The value of a per-epoch list in an epoch; the list is repeated when it is shorter than the run."""
    return values[epoch % len(values)]


def conditioned_share(epochs_done: float, annealing_epochs: float) -> float:
    """Share of each prompt that is never masked: 0 at the start, 1 from `annealing_epochs` on (report, section 4.3).

    Args:
        epochs_done: epochs trained so far, a fraction within an epoch.
        annealing_epochs: epochs over which the share grows linearly; 0 conditions on the whole prompt at once.
    """
    if annealing_epochs == 0:
        return 1.0
    return min(1.0, epochs_done / annealing_epochs)


def conditioned_positions(prompt_mask: Tensor, share: float) -> Tensor:
    """The first `floor(share * n)` of the n prompt positions of each row, counted over all turns. (B, T) bool."""
    rank = prompt_mask.cumsum(dim=1)  # 1 at the first prompt position
    # The small term keeps 0.29 * 100 from being 28.999...
    kept = torch.floor(share * prompt_mask.sum(dim=1, keepdim=True).double() + 1e-9)
    return prompt_mask & (rank <= kept)


@dataclass(frozen=True)
class Rows:
    """A batch of clean rows, padded on the right.

    Attributes:
        input_ids: (B, T) int64.
        present: (B, T) bool, False at padding.
        prompt_mask: (B, T) bool, positions that belong to a prompt.
        tail: (B, T) bool, positions that were added behind the answer.
        sample_ids: (B,) int64, index of each row in its dataset.
    """

    input_ids: Tensor
    present: Tensor
    prompt_mask: Tensor
    tail: Tensor
    sample_ids: Tensor


def add_tail(
    input_ids: Tensor,
    present: Tensor,
    *,
    complete: Tensor,
    num_tokens: int,
    tail_token_id: int,
    max_length: int,
    multiple_of: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Put `num_tokens` tail tokens behind each complete row, never beyond `max_length`.

    Args:
        input_ids: (B, T) int64, padded on the right.
        present: (B, T) bool, False at padding.
        complete: (B,) bool, rows that end with their end token; the others were cut and get no tail.
        num_tokens: tail length, in tokens.
        tail_token_id: the token of the tail.
        max_length: longest row with its tail, in tokens.
        multiple_of: the new width is rounded up to it.

    Returns:
        input_ids (B, T'), present (B, T') and tail (B, T'), with T' just wide enough for the longest row.
    """
    lengths = present.sum(dim=1)
    added = torch.clamp(max_length - lengths, min=0).clamp(max=num_tokens) * complete
    width = int((lengths + added).max())
    width = -(-width // multiple_of) * multiple_of
    grown = width - input_ids.shape[1]
    if grown > 0:
        input_ids = torch.nn.functional.pad(input_ids, (0, grown))
    input_ids = input_ids[:, :width]
    column = torch.arange(width, device=input_ids.device)[None, :]
    tail = (column >= lengths[:, None]) & (column < (lengths + added)[:, None])
    present = column < (lengths + added)[:, None]
    return torch.where(tail, tail_token_id, input_ids), present, tail


def tail_length(seed: int, step: int, longest: int) -> int:
    """Tail length of an optimizer step, uniform on [0, longest]: one for all its rows, so that batches stay even."""
    return int(named_rng("tail", seed, step).integers(longest + 1))


def last_answer(rows: Rows) -> Tensor:
    """Where the last answer of each row begins, (B, 1) int64: behind its last prompt position."""
    column = torch.arange(1, rows.input_ids.shape[1] + 1, device=rows.input_ids.device)
    return (column * rows.prompt_mask).amax(dim=1, keepdim=True)


def noise(
    rows: Rows,
    t: Tensor,
    *,
    share: float,
    seed: int,
    sample_ids: Sequence[int],
    t_min: float,
    blocks: Blocks | None = None,
    from_answer: bool = False,
    span_probability: float = 0.0,
    span_lengths: Sequence[int] = (1,),
    **token_facts: Any,
) -> NoisedRows | DoubledRows:
    """Mask answers, tails, and the part of the prompts that is not conditioned yet.

    Args:
        rows: the clean batch.
        t: (B,) float32, noise levels; with blocks each one's level is dealt from its row's.
        share: of each prompt that is never masked.
        seed: names the noise.
        sample_ids: number of each row in the run; each epoch has numbers of its own.
        t_min: the smallest noise level.
        blocks: of a model that attends by blocks.
        from_answer: whether blocks are counted from the last answer instead of the start of the text.
        span_probability: share of the rows that are masked in runs.
        span_lengths: of the runs, in tokens.
        **token_facts: see `CoDALanguageModel.noise.noise_rows`.
    """
    lengths = rows.present.sum(dim=1)
    drawn = draw_rows(
        seed,
        sample_ids,
        lengths.tolist(),
        rows.input_ids.shape[1],
        strategies=(0.0, 0.0, span_probability),
        span_lengths=span_lengths,
    ).to(rows.input_ids.device)
    drawn = drawn._replace(spans=torch.minimum(drawn.spans, lengths))  # a short row has no room for a long run
    clean = CleanRows(
        rows.input_ids,
        rows.present.long(),
        conditioned_positions(rows.prompt_mask, share),
        last_answer(rows) if from_answer else None,
    )
    if blocks is None:
        return noise_rows(clean, t, drawn, **token_facts)
    levels = spread_levels(t, clean.segment_ids, blocks, t_min=t_min, answer_start=clean.answer_start)
    return noise_blocks(clean, levels, drawn, blocks, **token_facts)
