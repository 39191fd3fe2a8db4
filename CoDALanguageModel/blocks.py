"""Scoring with attention by blocks: a pass computes the block that is decoded, and what is not stored yet.

Keys and values of a finished block depend on nothing behind it, so that keeping them changes no score: cached and
recomputed decoding are the same up to rounding. A finished block is stored by the pass that takes the first step of the
next one. Not here: how keys and values are stored (`cache`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention_coda import Visibility, block_causal, block_numbers, may_attend
from .cache import PagedCache
from .canvas import Canvas, Step
from .row import Row
from .scoring import Scorer, Scores, even_parts, merge

LEAST_SHARED = 32
"""Tokens at the start of two texts for which it pays to look."""

LONGEST_PART = 2048
"""Tokens of a prompt that a pass computes: the mask of a whole long one would have its length squared."""


class Span(NamedTuple):
    """What a pass computes of a row: positions [first, last) of its text."""

    first: int
    last: int
    stored: int
    """Positions whose keys and values are stored: the pass stores those from here to `start`."""

    start: int
    """First position of the block that is decoded."""


class BlockScorer(Scorer):
    """Scores the positions of rows whose attention goes by blocks.

    Args:
        model: a `CoDALanguageModel` with blocks.
        canvas: its rows.
        is_cached: whether keys and values of finished blocks are kept; or else all are computed in each pass.
    """

    def __init__(self, model: Any, canvas: Canvas, *, is_cached: bool):
        super().__init__(model, canvas, is_cached=False)
        self.cache = PagedCache() if is_cached else None
        self.texts: dict[Row, Any] = {}
        """The stored text of each row."""

    def settle(self, source: list[int]) -> None:
        """Follow the canvas, some of whose rows have left and others come; see `Canvas.settle`."""
        rows = self.canvas.rows
        self.answer_start = self.canvas.ids.new_tensor([row.answer_start for row in rows])[:, None]  # (R, 1)
        if self.cache is not None:
            self._open([row for row in rows if row not in self.texts])

    def _open(self, rows: list[Row]) -> None:
        """Give each row a text. What it has in common with another one is stored once, and computed once.

        Of rows that come together and begin alike the first one's part is computed in a pass before all others.
        """
        leaders, followers = [], []
        for row in rows:
            lengths = {other: row.shared_with(other) for other in (*self.texts, *leaders)}
            parent = max(lengths, key=lengths.__getitem__, default=None)
            if parent is not None and lengths[parent] >= LEAST_SHARED:
                followers.append((row, parent, lengths[parent]))
            else:
                leaders.append(row)
        self.texts.update((row, self.cache.open()) for row in leaders)
        due = {parent: max(n for _, other, n in followers if other is parent) for _, parent, _ in followers}
        self._store(due)
        for row, parent, shared in followers:
            self.texts[row] = self.cache.open(self.texts[parent], shared)
            row.cost.tokens_shared = shared
        self._store({row: row.whole_blocks(len(row.prefix) - LONGEST_PART) for row in rows})

    def _store(self, due: dict[Row, int]) -> None:
        """Compute and store the first tokens of texts, as many as `due` says, where they are not stored."""
        size = self.model.config.block_size
        while True:
            spans = {}
            for row, end in due.items():
                stored = self.cache.length(self.texts[row])
                if stored < end:
                    end = min(end, row.whole_blocks(stored + max(LONGEST_PART, size)))
                    spans[row] = Span(stored, end, stored, end)
            if not spans:
                return
            step = self.canvas.next_step([self.canvas.rows.index(row) for row in spans])
            ids = self.canvas.take(self.canvas.ids, step)
            self.forward(step, ids, torch.zeros_like(ids, dtype=torch.bool), list(spans.values()))

    def release(self, row: Row) -> None:
        """A row has left: its keys and values are free."""
        if row in self.texts:
            self.cache.close(self.texts.pop(row))

    def score(self, step: Step, ids: Tensor) -> Scores:
        """Logits of the positions that the step may fill."""
        window = self.canvas.window(step, ids)
        lengths = [span.last - span.first for span in self._spans(step)]
        # Where some rows have a prompt to compute and the others a block, a pass of all would be padding.
        parts = even_parts(lengths)
        if len(parts) == 1:
            return self.forward(step, ids, window)
        return merge([(p, self.forward(step.keep(p), ids[p], window[p])) for p in parts], window)

    def _spans(self, step: Step) -> list[Span]:
        return [self._span(row, c.block) for row, c in zip(self._rows(step), step.commits, strict=True)]

    def _span(self, row: Row, block: int) -> Span:
        """The columns that the scores of a block depend on and that are not stored; without a cache none is."""
        shift, keeps_deciding = self.model.config.logits_shift, row.sampling.order.keeps_deciding
        start, end = row.span(block)
        gaps, mask = row.gaps[row.starts[block] : row.starts[block + 1]], row.config.mask_token_id
        scored = gaps if keeps_deciding else [gap for gap in gaps if row.ids[gap] == mask]
        stored = self.cache.length(self.texts[row]) if self.cache is not None else 0
        first = min(stored, start)
        if shift and stored == start and scored[0] == row.columns[start]:  # the row before the block scores its first
            first -= 1
        is_inside = not shift or scored[-1] != row.columns[start]  # a row of the block scores one of it
        return Span(first, end if is_inside else start, stored, start)

    def forward(self, step: Step, ids: Tensor, window: Tensor, spans: list[Span] | None = None) -> Scores:
        """Run the model on the spans of the rows, and score the window.

        A row may stand in the step more than once: first as it is, then with drafts, of which nothing is stored.
        """
        canvas, spans = self.canvas, self._spans(step) if spans is None else spans
        first, last, stored, start = step.index.new_tensor(spans).T.unsqueeze(2)  # (R, 1) each
        # 1 which columns are computed; short rows repeat their first one, which no row sees
        place = torch.arange(max(span.last - span.first for span in spans), device=ids.device)
        is_real = first + place < last  # (R, W)
        position = torch.where(is_real, first + place, first)
        column = canvas.take(canvas.column, step).gather(1, position)
        # 2 what they may attend to: what is stored, and what is not and is computed
        is_new = is_real & (position >= stored)
        num_stored = 0
        if self.cache is not None:
            is_first = [row not in step.places[:i] for i, row in enumerate(step.places)]
            keep = is_new & (position < start) & torch.tensor(is_first, device=ids.device)[:, None]
            self.cache.bind([self.texts[row] for row in self._rows(step)], keep)
            num_stored = max(span.stored for span in spans)
        before = torch.arange(num_stored, device=ids.device).expand(len(spans), -1)
        every = torch.cat([before, position], dim=1)  # (R, K)
        if self.model.config.causal_context:
            block = torch.minimum(every, start)  # each token before the block that is decoded is one of its own
        else:
            block = block_numbers(every, self.model.config.block_size, canvas.take(self.answer_start, step))
        is_key = torch.cat([before < stored, is_new], dim=1)
        query = _clean(torch.ones_like(position), block[:, num_stored:])
        allowed = may_attend([x.unsqueeze(2) for x in query], [x.unsqueeze(1) for x in _clean(is_key.long(), block)])
        # 3 which rows of the result score what
        row, scored = window.nonzero(as_tuple=True)  # (N,), (N,)
        source = canvas.source[step.index[row], scored]
        slot = canvas.position_ids[step.index[row], source] - first[row, 0]
        # 4 run
        self._count(step, [span.last - span.first for span in spans])
        logits = self.model(
            input_ids=ids.gather(1, column),
            attention_mask=allowed[:, None],
            position_ids=position,
            past_key_values=self.cache,
            positions=row * len(place) + slot,
            return_dict=True,
        ).logits
        return self._process(step, ids, Scores(row, scored, logits))


def _clean(segment: Tensor, block: Tensor) -> Visibility:
    return block_causal(segment, block, torch.ones_like(segment, dtype=torch.bool))
