"""From a canvas that fills out of order to text that never has to be taken back.

Pure functions. Not here: how the text travels (``streaming``).
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]

Decode = Callable[[Sequence[int]], str]
"""Token ids to text; a longer list of ids gives a longer text, save for a character cut at its end (U+FFFD)."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a client may be shown of an answer."""

    text: str
    """Never shorter at a later step, and each later text starts with it."""

    num_tokens: int
    """Committed tokens that the text stands for; the end-of-sequence token is not counted."""

    finish_reason: FinishReason | None
    """``stop`` after an end token or a stop string, ``length`` when the canvas is full, None while it is not."""


def committed_prefix(answer_ids: Sequence[int], mask_token_id: int) -> list[int]:
    """Tokens before the first mask: all that may be shown, since a canvas fills out of order."""
    ids = list(answer_ids)
    return ids[: ids.index(mask_token_id)] if mask_token_id in ids else ids


def read_answer(
    answer_ids: Sequence[int],
    *,
    decode: Decode,
    mask_token_id: int,
    eos_token_ids: frozenset[int],
    stop: Sequence[str] = (),
) -> Reading:
    """Read the part of a canvas that belongs to the answer.

    The answer ends before its first end-of-sequence token, or before the stop string that is complete first, so that
    the cut is the same whether it is looked for while the canvas fills or afterwards.

    Args:
        answer_ids: (num_tokens,) ids of the answer's part of the canvas, masks included.
        decode: ids to text.
        mask_token_id: id of a token that is not committed yet.
        eos_token_ids: ids that end an answer.
        stop: strings that end an answer; none is empty.
    """
    ids = committed_prefix(answer_ids, mask_token_id)
    full = len(ids) == len(answer_ids)
    end = next((i for i, token in enumerate(ids) if token in eos_token_ids), None)
    if end is not None:
        ids = ids[:end]
    ended = full or end is not None
    text = decode(ids) if ended else _whole_characters(decode(ids))
    cut = _first_complete(text, stop)
    if cut is not None:
        start, stop_end = cut
        tokens_until = range(len(ids) + 1)
        needed = bisect.bisect_left(
            tokens_until, True, key=lambda n: len(_whole_characters(decode(ids[:n]))) >= stop_end
        )
        return Reading(text=text[:start], num_tokens=min(needed, len(ids)), finish_reason="stop")
    if not ended:
        return Reading(text=_hold_back(text, stop), num_tokens=len(ids), finish_reason=None)
    return Reading(text=text, num_tokens=len(ids), finish_reason="stop" if end is not None else "length")


def _whole_characters(text: str) -> str:
    """Drop what may be the first bytes of a character whose other bytes are still to come."""
    return text.rstrip("\ufffd")


def _first_complete(text: str, stop: Sequence[str]) -> tuple[int, int] | None:
    """Start and end of the stop string that ends first in ``text``, the longest of those that end together."""
    found = [(start + len(string), start) for string in stop if (start := text.find(string)) >= 0]
    if not found:
        return None
    end, start = min(found)
    return start, end


def _hold_back(text: str, stop: Sequence[str]) -> str:
    """Drop the longest end of ``text`` with which a stop string could begin."""
    longest = max((len(string) - 1 for string in stop), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-size:]) for string in stop if len(string) > size):
            return text[:-size]
    return text
