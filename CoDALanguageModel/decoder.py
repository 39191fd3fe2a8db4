"""The open decoding loop: rows join, take steps together and leave, each with settings of its own.

Not here: batches that are given and taken whole (`generation_coda`), text, and who may wait (the server).
"""

import dataclasses
from typing import Any, NamedTuple

import torch

from .blocks import BlockScorer
from .canvas import Canvas
from .constraints import Lexicon, constraint_of
from .row import Decode, FinishReason, Request, Row, complete
from .scoring import Scorer
from .speculation import Speculation
from .stepwise import Stepwise


class Progress(NamedTuple):
    """What a step did to a row."""

    row: Row
    """The handle that `admit` gave; `row.ids` is its canvas."""

    settled: int
    """Columns at the left of the canvas whose tokens are final."""

    changed: list[int]
    """Columns whose token is another than before the step; `row.ids` has the new ones."""

    finished: FinishReason | None
    """Why the row is finished and has left; None while it goes on, and where there was an error."""

    error: Exception | None
    """What was wrong with this row alone; it has left."""


class Decoding:
    """Rows that are decoded together; each gets exactly the tokens that it gets alone.

    Rows share forward passes whatever their settings are, save that rows with a cache, rows that speculate and all
    others need passes of different kinds. A step is one pass for each kind that is present; two with a cache, where
    some rows refresh it; and one for rows of like lengths each on a CPU, where padding costs as much as text, and with
    attention by blocks, where some rows compute a prompt and others a block. A row that ends is not computed again.

    Args:
        model: a `CoDALanguageModel` in evaluation mode.
        decode: turns token ids into text, for rows with `stop_strings`.
        lexicon: of the tokenizer, for rows with `regex` or `json_schema` whose request has no constraint.
    """

    def __init__(self, model: Any, *, decode: Decode | None = None, lexicon: Lexicon | None = None):
        self._model, self._decode, self._lexicon = model, decode, lexicon
        self._lanes: dict[tuple[bool, bool], Stepwise] = {}
        self._num_admitted = 0

    @property
    def rows(self) -> list[Row]:
        """All rows that are being decoded or will be from the next step on, in the order of their admission."""
        rows = (row for lane in self._lanes.values() for row in lane.canvas.present)
        return sorted(rows, key=lambda row: row.number)

    @property
    def width(self) -> int:
        """Columns of the widest row."""
        return max((row.width for row in self.rows), default=0)

    @property
    def forwards(self) -> int:
        """Forward passes so far."""
        return sum(lane.scorer.forwards for lane in self._lanes.values())

    def admit(self, request: Request) -> Row:
        """Take a row in; it takes part in the next step.

        Raises:
            UserError: it cannot be decoded; nothing has changed then.
        """
        if request.constraint is None and self._lexicon is not None:
            config = complete(request.settings, self._model.config)
            made = constraint_of(config, self._model.config.vocab_size, self._lexicon)
            request = request if made is None else dataclasses.replace(request, constraint=made)
        row = Row(request, self._num_admitted, self._model.config, self._decode)
        self._num_admitted += 1
        is_cached, speculates = row.config.kv_cache != "none", bool(row.config.speculate)
        if (is_cached, speculates) not in self._lanes:
            canvas = Canvas(self._model.device)
            kind = BlockScorer if self._model.config.has_blocks else Scorer
            scorer = kind(self._model, canvas, is_cached=is_cached)
            self._lanes[is_cached, speculates] = (Speculation if speculates else Stepwise)(canvas, scorer)
        self._lanes[is_cached, speculates].canvas.waiting.append(row)
        return row

    @torch.no_grad()
    def step(self) -> list[Progress]:
        """Take one step of every row; those that it finishes leave.

        Returns:
            One record per row; none once nothing is left to decode.
        """
        progress = []
        for lane in self._lanes.values():
            lane.settle()
            rows = lane.canvas.rows
            if not rows:
                continue
            for row in rows:
                row.changed = []
            lane.advance()
            for row in rows:
                is_over = row.error is not None or row.is_finished
                if is_over:
                    lane.release(row)
                finished = row.reason if is_over and row.error is None else None
                progress.append(Progress(row, row.settled, row.changed, finished, row.error))
        return progress

    def drop(self, row: Row) -> None:
        """Take a row out, finished or not. One that has left already is no error."""
        for lane in self._lanes.values():
            if row.is_present and (row in lane.canvas.rows or row in lane.canvas.waiting):
                lane.release(row)
