"""Filling gaps in a text: several at once, of known or unknown length. The text around them never changes."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from .configuration_coda import token_ids
from .errors import UserError

MAX_CANDIDATES = 64
"""Most combinations of lengths that are tried for one text: each is a row of the batch."""


class GappedText(NamedTuple):
    """A text with gaps, laid out."""

    ids: list[int]
    """Pieces and masks in turn."""

    gaps: list[slice]
    """Where the masks of each gap stand in `ids`."""


def lay_out(
    pieces: Sequence[Sequence[int]],
    lengths: Sequence[int],
    mask_token_id: int,
    start_token_id: int | None = None,
) -> GappedText:
    """Lay out n + 1 pieces of a text around n gaps.

    Args:
        pieces: ids of each piece; the outer ones, and those between two gaps, may be empty.
        lengths: masks of each gap.
        mask_token_id: the mask.
        start_token_id: put in front of a text that begins with a gap, where the first position of a row has no
            predecessor to score it; None puts nothing there.

    Raises:
        UserError: not one length per gap, or a piece that holds the mask.
    """
    if len(lengths) != len(pieces) - 1:
        raise UserError(f"lengths must hold one length per gap ({len(pieces) - 1}), got {len(lengths)}")
    if any(mask_token_id in piece for piece in pieces):
        raise UserError(f"pieces must not hold the mask token {mask_token_id}: gaps stand between the pieces")
    ids, gaps = list(pieces[0]), []
    if not ids and start_token_id is not None:
        ids = [start_token_id]
    for piece, length in zip(pieces[1:], lengths, strict=True):
        gaps.append(slice(len(ids), len(ids) + length))
        ids += [mask_token_id] * length + list(piece)
    return GappedText(ids, gaps)


@dataclass
class InfillOutput:
    """A text with its gaps filled.

    Attributes:
        gaps: the tokens of each gap.
        ids: the whole text, pieces and gaps in turn.
        score: mean log-probability of the filled tokens when they were committed, in nats.
        gap_lengths: the masks that each gap had.
        candidates: score of every combination of lengths that was tried.
        cost: the `DecodingCost` of all candidates together; its `answer_tokens` are those of `gaps`.
    """

    gaps: list[list[int]]
    ids: list[int]
    score: float
    gap_lengths: tuple[int, ...]
    candidates: dict[tuple[int, ...], float]
    cost: Any


def candidate_lengths(most: int, num_gaps: int = 1) -> list[tuple[int, ...]]:
    """The combinations of gap lengths to try where none is known.

    For one gap these are the powers of two below `most`, and `most`. Several gaps share `most` masks; each takes as
    many of those lengths, spread evenly over them and the first and the last among them, as keeps all combinations
    within `MAX_CANDIDATES`.

    Args:
        most: masks of all gaps together.
        num_gaps: how many gaps.

    Raises:
        UserError: more gaps than masks, or so many gaps that no two lengths of each could be tried.
    """
    longest = most - num_gaps + 1
    if longest < 1:
        raise UserError(f"{num_gaps} gaps need at least one mask each, got {most} for all of them")
    lengths = [*itertools.takewhile(lambda length: length < longest, (2**i for i in itertools.count())), longest]
    each = max(count for count in range(1, MAX_CANDIDATES + 1) if count**num_gaps <= MAX_CANDIDATES)
    if each < min(2, len(lengths)):
        raise UserError(f"{num_gaps} gaps of unknown length have more than {MAX_CANDIDATES} combinations: give lengths")
    if len(lengths) > each:
        lengths = [lengths[i * (len(lengths) - 1) // (each - 1)] for i in range(each)]
    return [each for each in itertools.product(lengths, repeat=num_gaps) if sum(each) <= most]


def infill(
    model: Any,
    pieces: Sequence[Sequence[int]],
    *,
    gap_lengths: Sequence[int] | None = None,
    infill_lengths: Sequence[int] | None = None,
    end_of_gap: bool = False,
    **settings,
) -> InfillOutput:
    """Fill the gaps between consecutive pieces of a text.

    Args:
        model: a `CoDALanguageModel`.
        pieces: n + 1 lists of token ids around n gaps; the last may be empty, the first must hold a
            token, which scores the first mask; a literal mask id may not occur.
        gap_lengths: masks of each gap, where the lengths are known.
        infill_lengths: candidate lengths, where they are not: every combination over the gaps is decoded as a row of
            one batch, and the one with the highest mean log-probability per filled token is kept, the first of equals.
        end_of_gap: cut each gap at its first end token, which marks the end of a gap that was given too many masks.
        **settings: decoding settings, see `DiffusionGenerationConfig`.

    Raises:
        UserError: not exactly one of `gap_lengths` and `infill_lengths`, lengths that are not positive, or too many
            combinations, or a first gap that nothing stands before.
    """
    num_gaps = len(pieces) - 1
    if num_gaps < 1:
        raise UserError(f"pieces must hold at least 2 lists, one on each side of a gap, got {len(pieces)}")
    if (gap_lengths is None) == (infill_lengths is None):
        raise UserError("give exactly one of gap_lengths (known) and infill_lengths (candidates)")
    if gap_lengths is not None and len(gap_lengths) != num_gaps:
        raise UserError(f"gap_lengths must hold one length per gap ({num_gaps}), got {len(gap_lengths)}")
    for name, values in (("gap_lengths", gap_lengths), ("infill_lengths", infill_lengths)):
        if values is not None and (not values or min(values) < 1):
            raise UserError(f"{name} must be integers >= 1, got {list(values)}")
    for name in ("max_new_tokens", "num_return_sequences", "output_scores", "return_dict_in_generate"):
        if name in settings:
            raise UserError(f"{name} is set by infill itself")
    mask_id = model.config.mask_token_id
    if gap_lengths is not None:
        combinations = [tuple(gap_lengths)]
    else:
        if len(set(infill_lengths)) ** num_gaps > MAX_CANDIDATES:
            raise UserError(
                f"infill_lengths give {len(set(infill_lengths))}^{num_gaps} combinations for {num_gaps} gaps, more "
                f"than {MAX_CANDIDATES}: give fewer lengths, or fill fewer gaps at a time"
            )
        combinations = list(itertools.product(dict.fromkeys(infill_lengths), repeat=num_gaps))

    texts = [lay_out(pieces, combination, mask_id) for combination in combinations]
    rows = [text.ids for text in texts]
    width = max(map(len, rows))
    inputs = torch.full((len(rows), width), model.config.pad_token_id or 0)
    attention_mask = torch.zeros_like(inputs)
    for i, row in enumerate(rows):
        inputs[i, width - len(row) :], attention_mask[i, width - len(row) :] = torch.tensor(row), 1
    output = model.diffusion_generate(
        inputs, attention_mask, max_new_tokens=0, output_scores=True, return_dict_in_generate=True, **settings
    )
    filled = (inputs == mask_id) & attention_mask.bool()
    mean = (output.scores.cpu() * filled).sum(dim=1) / filled.sum(dim=1)
    best = int(mean.argmax())
    ids = output.sequences[best, width - len(rows[best]) :].tolist()
    gaps = [ids[where] for where in texts[best].gaps]
    if end_of_gap:
        ends = set(token_ids(model.config.eos_token_id))
        gaps = [list(itertools.takewhile(lambda token: token not in ends, gap)) for gap in gaps]
        parts = itertools.zip_longest(pieces, gaps, fillvalue=())
        ids = [token for piece, gap in parts for token in (*piece, *gap)]
    return InfillOutput(
        gaps=gaps,
        ids=ids,
        score=float(mean[best]),
        gap_lengths=combinations[best],
        candidates=dict(zip(combinations, mean.tolist(), strict=True)),
        cost=replace(output.cost, answer_tokens=sum(map(len, gaps))),
    )
