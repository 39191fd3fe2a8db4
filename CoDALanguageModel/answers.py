"""From ids to the text of an answer, and where it ends: one rule for every room.

An answer ends before its first end token, or before the stop string that is complete first. A canvas fills out of
order, and what is read of it never has to be taken back. Not here: how text becomes ids and back (`prompts`).
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .configuration_coda import token_ids

INCOMPLETE = "\ufffd"
"""What decoders write for bytes that are no whole character yet."""

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
    """`stop` after an end token or a stop string, `length` when the canvas is full, None while it is not."""

    end: int | None
    """Tokens up to the end of the answer, its end token or stop string included; None while it may go on."""

    stop: str | None = None
    """The stop string that ended the answer, if one did."""


def end_ids(*sources: Any) -> frozenset[int]:
    """Ids that end an answer: end tokens, and the pad that stands behind them.

    Args:
        sources: what names tokens by `eos_token_id` and `pad_token_id`: configurations, a tokenizer.
    """
    names = ("eos_token_id", "pad_token_id")
    return frozenset(i for source in sources for name in names for i in token_ids(getattr(source, name)))


class AnswerReader:
    """Reads one answer, again and again while it grows or its part of a canvas fills.

    What was read is kept and not decoded again, so that all steps together cost one pass over the answer. The cut is
    the same whether it is looked for while the answer grows or afterwards.

    Args:
        decode: ids to text.
        mask_token_id: id of a token that is not committed yet.
        eos_token_ids: ids that end an answer.
        prompt_ids: ids left of the answer.
        stop: strings that end an answer; none is empty.
        begins: text that the tokens begin with and that is no part of the answer.
    """

    def __init__(
        self,
        *,
        decode: Decode,
        mask_token_id: int,
        eos_token_ids: frozenset[int],
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        begins: str = "",
    ) -> None:
        self._decode = decode
        self._prompt_ids = prompt_ids
        self._mask_token_id = mask_token_id
        self._eos_token_ids = eos_token_ids
        self._stop = stop
        self._begins = len(begins)
        self._longest_stop = max(map(len, stop), default=0)
        self._ids: list[int] = []
        """Tokens of the answer that were read, without the end token."""
        self._num_decoded = 0
        """Those of them whose text is final."""
        self._text = ""
        """That text."""
        self._searched = 0
        """Characters of the answer in which no stop string ends."""
        self._reading: Reading | None = None

    def read(self, answer_ids: Sequence[int]) -> Reading:
        """Read what has been committed since the last call.

        Args:
            answer_ids: (num_tokens,) ids of the answer's part of the canvas, masks included; what stands left of the
                first mask is the same in every later call.
        """
        settled = _first(answer_ids, self._mask_token_id, len(self._ids))
        return self.feed(answer_ids[len(self._ids) : settled], is_full=settled == len(answer_ids))

    def feed(self, ids: Sequence[int], *, is_full: bool = False) -> Reading:
        """Read the next tokens of the answer, which are final.

        Args:
            ids: those that follow the ones of the calls before; what follows an end is not read.
            is_full: no more will come.
        """
        if self._reading is not None and (self._reading.end is not None or not (len(ids) or is_full)):
            return self._reading
        end = next((place for place, token in enumerate(ids) if token in self._eos_token_ids), None)
        self._ids += ids[:end]
        self._reading = self._read(has_end_token=end is not None, is_full=is_full)
        return self._reading

    def _read(self, *, has_end_token: bool, is_full: bool) -> Reading:
        is_whole = has_end_token or is_full
        tail = self._decode_tail()
        text = self._text + tail
        shown = text if is_whole else _whole_characters(text)
        cut = self._first_complete(shown)
        if cut is not None:
            start, stop_end = cut
            num = self._tokens_for(stop_end)
            string = shown[start:stop_end]
            text = shown[self._begins : start]
            return Reading(text=text, num_tokens=num, finish_reason="stop", end=num, stop=string)
        self._searched = len(shown)
        num = len(self._ids)
        if not is_whole:
            text = _hold_back(shown, self._stop)[self._begins :]
            return Reading(text=text, num_tokens=num, finish_reason=None, end=None)
        reason: FinishReason = "stop" if has_end_token else "length"
        text = shown[self._begins :]
        return Reading(text=text, num_tokens=num, finish_reason=reason, end=num + has_end_token)

    def _decode_tail(self) -> str:
        """Text of the tokens that were read and whose text is not final; what becomes final is moved to the text."""
        tail = self._ids[self._num_decoded :]
        before = TEXT if self._num_decoded else self._prompt_ids
        text = self._decode(tail, before)
        if not text.endswith(INCOMPLETE):
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
        """Start and end of the stop string that ends first in `text`, the longest of those that end together."""
        begin = max(self._begins, self._searched - self._longest_stop)
        found = [(start + len(string), start) for string in self._stop if (start := text.find(string, begin)) >= 0]
        if not found:
            return None
        end, start = min(found)
        return start, end

    def _tokens_for(self, length: int) -> int:
        """The fewest tokens whose text has `length` characters."""
        ids = self._ids
        enough = bisect.bisect_left(
            range(len(ids) + 1),
            True,
            key=lambda n: len(_whole_characters(self._decode(ids[:n], self._prompt_ids))) >= length,
        )
        return min(enough, len(ids))


def _first(ids: Sequence[int], token: int, start: int) -> int:
    """Place of the first `token` from `start` on; the length of `ids` where there is none."""
    try:
        return ids.index(token, start)
    except ValueError:
        return len(ids)


def _whole_characters(text: str) -> str:
    """Drop what may be the first bytes of a character whose other bytes are still to come."""
    return text.rstrip(INCOMPLETE)


def _hold_back(text: str, stop: Sequence[str]) -> str:
    """Drop the longest end of `text` with which a stop string could begin."""
    longest = max((len(string) - 1 for string in stop), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-size:]) for string in stop if len(string) > size):
            return text[:-size]
    return text
