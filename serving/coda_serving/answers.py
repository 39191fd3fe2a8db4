"""From a canvas that fills out of order to text that never has to be taken back.

Not here: how the text travels (``streaming``).
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]

Decode = Callable[[Sequence[int], Sequence[int]], str]
"""The text that token ids add behind other ones; what two lists give in turn is what they give together, save for a
character cut between them (U+FFFD)."""

TEXT = (-1,)
"""Stands for ids of any text left of others."""

LONGEST_TAIL = 32
"""Tokens that may wait for the rest of a character. No character has so many bytes: what waits longer is no text."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a client may be shown of an answer."""

    text: str
    """Never shorter at a later step, and each later text starts with it."""

    num_tokens: int
    """Committed tokens that the text stands for; the end-of-sequence token is not counted."""

    finish_reason: FinishReason | None
    """``stop`` after an end token or a stop string, ``length`` when the canvas is full, None while it is not."""


class AnswerReader:
    """Reads the part of a canvas that belongs to one answer, again and again while it fills.

    What was read is kept and not decoded again, so that all steps together cost one pass over the answer. The answer
    ends before its first end-of-sequence token, or before the stop string that is complete first, so that the cut is
    the same whether it is looked for while the canvas fills or afterwards.

    Args:
        decode: ids to text.
        mask_token_id: id of a token that is not committed yet.
        eos_token_ids: ids that end an answer.
        prompt_ids: ids left of the answer.
        stop: strings that end an answer; none is empty.
    """

    def __init__(
        self,
        *,
        decode: Decode,
        mask_token_id: int,
        eos_token_ids: frozenset[int],
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
    ) -> None:
        self._decode = decode
        self._prompt_ids = prompt_ids
        self._mask_token_id = mask_token_id
        self._eos_token_ids = eos_token_ids
        self._stop = stop
        self._longest_stop = max(map(len, stop), default=0)
        self._num_read = 0
        """Tokens of the answer that were read."""
        self._num_decoded = 0
        """Those of them whose text is final."""
        self._text = ""
        """That text."""
        self._searched = 0
        """Characters of the answer in which no stop string ends."""

    def read(self, answer_ids: Sequence[int]) -> Reading:
        """Read what has been committed since the last call.

        Args:
            answer_ids: (num_tokens,) ids of the answer's part of the canvas, masks included; what stands left of the
                first mask is the same in every later call.
        """
        num_committed = _first(answer_ids, self._mask_token_id, self._num_read)
        full = num_committed == len(answer_ids)
        fresh = enumerate(answer_ids[self._num_read : num_committed], self._num_read)
        end = next((i for i, token in fresh if token in self._eos_token_ids), None)
        self._num_read = num_committed if end is None else end
        ended = full or end is not None
        tail = self._decode_tail(answer_ids)
        text = self._text + tail
        shown = text if ended else _whole_characters(text)
        cut = self._first_complete(shown)
        if cut is not None:
            start, stop_end = cut
            return Reading(text=shown[:start], num_tokens=self._tokens_for(answer_ids, stop_end), finish_reason="stop")
        self._searched = len(shown)
        if not ended:
            return Reading(text=_hold_back(shown, self._stop), num_tokens=self._num_read, finish_reason=None)
        return Reading(text=shown, num_tokens=self._num_read, finish_reason="length" if end is None else "stop")

    def _decode_tail(self, answer_ids: Sequence[int]) -> str:
        """Text of the tokens that were read and whose text is not final; what becomes final is moved to the text."""
        tail = list(answer_ids[self._num_decoded : self._num_read])
        before = TEXT if self._num_decoded else self._prompt_ids
        text = self._decode(tail, before)
        if not text.endswith("\ufffd"):
            taken = len(tail)
        elif len(tail) > LONGEST_TAIL:
            # Bytes that are no text are final as far as they can be divided: at any border of characters.
            borders = range(len(tail) - LONGEST_TAIL // 2, 0, -1)
            parts = ((i, self._decode(tail[:i], before) + self._decode(tail[i:], TEXT)) for i in borders)
            taken = next((i for i, joined in parts if joined == text), 0)
        else:
            taken = 0
        rest = text if not taken else self._decode(tail[taken:], TEXT) if taken < len(tail) else ""
        self._text += text[: len(text) - len(rest)]
        self._num_decoded += taken
        return rest

    def _first_complete(self, text: str) -> tuple[int, int] | None:
        """Start and end of the stop string that ends first in ``text``, the longest of those that end together."""
        begin = max(0, self._searched - self._longest_stop)
        found = [(start + len(string), start) for string in self._stop if (start := text.find(string, begin)) >= 0]
        if not found:
            return None
        end, start = min(found)
        return start, end

    def _tokens_for(self, answer_ids: Sequence[int], length: int) -> int:
        """The fewest tokens whose text has ``length`` characters."""
        ids = list(answer_ids[: self._num_read])
        enough = bisect.bisect_left(
            range(len(ids) + 1),
            True,
            key=lambda n: len(_whole_characters(self._decode(ids[:n], self._prompt_ids))) >= length,
        )
        return min(enough, len(ids))


def num_committed(answer_ids: Sequence[int], mask_token_id: int) -> int:
    """Tokens before the first mask: all that may be shown, since a canvas fills out of order."""
    return _first(answer_ids, mask_token_id, 0)


def _first(ids: Sequence[int], token: int, start: int) -> int:
    """Place of the first ``token`` from ``start`` on; the length of ``ids`` where there is none."""
    try:
        return ids.index(token, start)
    except ValueError:
        return len(ids)


def _whole_characters(text: str) -> str:
    """Drop what may be the first bytes of a character whose other bytes are still to come."""
    return text.rstrip("\ufffd")


def _hold_back(text: str, stop: Sequence[str]) -> str:
    """Drop the longest end of ``text`` with which a stop string could begin."""
    longest = max((len(string) - 1 for string in stop), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-size:]) for string in stop if len(string) > size):
            return text[:-size]
    return text
