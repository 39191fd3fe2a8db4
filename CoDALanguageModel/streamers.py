"""What a streamer is told while `diffusion_generate` fills a canvas. Not here: printing (transformers' streamers)."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .row import Change, Request, Row


class Streamer(Protocol):
    """transformers' `BaseStreamer`: gets final tokens, and takes none of them back."""

    def put(self, value: Tensor) -> None:
        """First (1, P) int64, the tokens before the first mask; then (1, n) that have become final, in order."""

    def end(self) -> None:
        """No more will come."""


@runtime_checkable
class DraftStreamer(Streamer, Protocol):
    """transformers' `TextDiffusionStreamer`: is also shown what is not final."""

    def put_draft(self, value: Tensor) -> None:
        """After each pass (1, n) int64, all that has not been put: with what the pass would have put at its masks."""


@runtime_checkable
class ChangeStreamer(Streamer, Protocol):
    """Is shown each step's changes; `canvas_view.CanvasStreamer` is one."""

    def begin(self, pieces: Sequence[Sequence[int]], gap_lengths: Sequence[int]) -> None:
        """Ids before, between and behind the gaps, and the masks of each, before the first pass."""

    def put_changes(self, changes: Sequence[Change]) -> None:
        """After each pass; `column` counts from the first mask."""


def wants_guesses(streamer: Any) -> bool:
    """Whether a streamer is shown what is not final."""
    return isinstance(streamer, (DraftStreamer, ChangeStreamer))


class Feed:
    """Tells a streamer what becomes of one row; padding is left out.

    Args:
        streamer: a `Streamer`.
        request: of the row.
        row: None for one without masks.
    """

    def __init__(self, streamer: Any, request: Request, row: Row | None) -> None:
        self._streamer, self._row = streamer, row
        real = [i for i, is_real in enumerate(request.attention_mask or [1] * len(request.ids)) if is_real]
        self._columns = real if row is None else row.columns
        ids = request.ids if row is None else row.ids
        text = [ids[column] for column in self._columns]
        self._first = len(text) if row is None else bisect_left(self._columns, row.gaps[0])
        self._told = self._first
        self._put("put", text[: self._told])
        if row is not None and isinstance(streamer, ChangeStreamer):
            pieces, lengths = [text[: self._first]], []
            mask = row.config.mask_token_id
            for is_mask, run in groupby(text[self._first :], lambda token: token == mask):
                run = list(run)
                lengths += [len(run)] if is_mask else []
                pieces += [] if is_mask else [run]
            streamer.begin(pieces if len(pieces) > len(lengths) else [*pieces, []], lengths)

    def step(self) -> None:
        """Tell of a pass."""
        row, streamer = self._row, self._streamer
        final = bisect_left(self._columns, min(row.settled, row.end))
        if final > self._told:
            self._put("put", [row.ids[column] for column in self._columns[self._told : final]])
            self._told = final
        if isinstance(streamer, ChangeStreamer):
            places = ((change, bisect_left(self._columns, change.column)) for change in row.shown())
            streamer.put_changes([change._replace(column=place - self._first) for change, place in places])
        if row.is_present and isinstance(streamer, DraftStreamer):
            guessed = {column: token for column, (token, _) in row.guesses.items()}
            self._put("put_draft", [guessed.get(column, row.ids[column]) for column in self._columns[self._told :]])

    def _put(self, how: str, ids: list[int]) -> None:
        getattr(self._streamer, how)(torch.tensor([ids], dtype=torch.long))

    def end(self) -> None:
        """Tell that no more will come."""
        self._streamer.end()
