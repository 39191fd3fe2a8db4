"""Scoring: forward passes of rows, whole or through the cache, to the logits of the positions to fill.

Not here: which rows and positions (`canvas`), and what becomes of the logits (`stepwise`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import CanvasCache, Columns
from .canvas import Canvas, Step, refit
from .row import Row

FAR = 2**32
"""More tokens than a row has."""

TOKENS_OF_A_PASS = 256
"""Padding that a CPU computes in the time that another forward pass costs by itself; an accelerator has it for free."""


class Scores(NamedTuple):
    """Logits of the scored positions of some rows, in row-major order."""

    row: Tensor
    """(N,) int64, row among those of the step."""

    column: Tensor
    """(N,) int64."""

    logits: Tensor
    """(N, V), aligned: they score the token at (row, column)."""

    def of_rows(self, positions: list[int], num_rows: int) -> "Scores":
        """The part that belongs to some of the rows, renumbered from 0; rows side by side are not copied."""
        if positions == list(range(positions[0], positions[-1] + 1)):
            bounds = self.row.new_tensor([positions[0], positions[-1] + 1])
            first, last = torch.searchsorted(self.row, bounds).tolist()
            return Scores(self.row[first:last] - positions[0], self.column[first:last], self.logits[first:last])
        place = self.row.new_full((num_rows,), -1)
        place[positions] = torch.arange(len(positions), device=self.row.device)
        row = place[self.row]
        kept = row >= 0
        return Scores(row[kept], self.column[kept], self.logits[kept])


class Scorer:
    """Scores the positions of a canvas with the model, each row in its own regime, and counts what it costs.

    Args:
        model: a `CoDALanguageModel`.
        canvas: its rows.
        is_cached: whether keys and values are kept; all rows of the canvas then want it.
    """

    def __init__(self, model: Any, canvas: Canvas, *, is_cached: bool):
        self.model, self.canvas = model, canvas
        self.forwards = 0
        self.cache = CanvasCache(0, 0) if is_cached else None
        self.is_stored = torch.zeros(0, 0, dtype=torch.bool, device=canvas.device)  # (B, T) columns in the cache

    def settle(self, source: list[int]) -> None:
        """Follow the canvas, some of whose rows have left and others come; see `Canvas.settle`."""
        canvas = self.canvas
        self.is_windowed = any(row.config.suffix_window is not None for row in canvas.rows)
        if self.cache is None:
            on_cpu = canvas.device.type == "cpu"
            self.passes = even_parts([row.num_real for row in canvas.rows]) if on_cpu else []
            return
        width = canvas.ids.shape[1]
        self.cache.refit(source, width)
        self.is_stored = refit(self.is_stored, source, width, False)
        self.is_prefix = torch.tensor([row.config.kv_cache == "prefix" for row in canvas.rows], device=canvas.device)
        widths = [row.config.refresh_window for row in canvas.rows]
        self.refresh_width = None
        if any(w is not None for w in widths):
            self.refresh_width = canvas.ids.new_tensor([FAR if w is None else w for w in widths])

    def release(self, row: Row) -> None:
        """A row has left; what is kept of it goes with the next `settle`."""

    def score(self, step: Step, ids: Tensor) -> Scores:
        """Logits of the positions that the step may fill, from the cache where it is young enough."""
        window = self.canvas.window(step, ids)
        if self.cache is None:
            if len(self.passes) < 2:
                return self.forward(step, ids, window)
            real = self._visible(step)
            passes = [
                (places, self.forward(step.keep(places), ids[places], window[places], computed=real[places]))
                for places in self.passes
            ]
            return merge(passes, window)
        is_fresh = [self._needs_refresh(row, c.block) for row, c in zip(self._rows(step), step.commits, strict=True)]
        fresh = [i for i, value in enumerate(is_fresh) if value]
        stale = [i for i, value in enumerate(is_fresh) if not value]
        parts = []
        for positions, refresh in ((fresh, True), (stale, False)):
            if positions:
                part_step = step if len(positions) == len(step.places) else step.keep(positions)
                part_ids = ids if len(positions) == len(step.places) else ids[positions]
                parts.append((positions, self._cached_scores(part_step, part_ids, window[positions], refresh)))
        return parts[0][1] if len(parts) == 1 else merge(parts, window)

    def _rows(self, step: Step) -> list[Row]:
        return [self.canvas.rows[i] for i in step.places]

    @staticmethod
    def _needs_refresh(row: Row, block: int) -> bool:
        interval = row.config.refresh_interval
        expired = interval is not None and row.cache_age >= interval
        return row.cached_block != block or expired

    def _cached_scores(self, step: Step, ids: Tensor, window: Tensor, refresh: bool) -> Scores:
        rows = self._rows(step)
        for row, commit in zip(rows, step.commits, strict=True):
            if refresh:
                row.cached_block, row.cache_age = commit.block, 0
                row.cost.cache_refreshes += 1
            row.cache_age += 1
        if refresh:
            return self.forward(step, ids, window, self.cache, computed=self._refresh_window(step, window))
        cached = self.forward(step, ids, window, self.cache, computed=self._cached_window(step, window))
        due = [
            i
            for i, row in enumerate(rows)
            if row.config.cache_drift is not None and (row.cache_age - 1) % row.config.drift_interval == 0
        ]
        return self._correct_drift(step, ids, window, cached, due) if due else cached

    def _correct_drift(self, step: Step, ids: Tensor, window: Tensor, cached: Scores, due: list[int]) -> Scores:
        """Compare cached with fresh distributions, and refresh the rows whose mean KL is over the budget."""
        due_step, due_ids = step.keep(due), ids[due]
        rows = self._rows(due_step)
        for row in rows:
            row.cost.drift_checks += 1
        trial = CanvasCache(len(due), ids.shape[1])
        fresh = self.forward(due_step, due_ids, window[due], trial, trial_rows=True)
        compared = cached.of_rows(due, len(step.places))
        p, q = fresh.logits.float().log_softmax(dim=1), compared.logits.float().log_softmax(dim=1)
        kl = (p.exp() * (p - q).nan_to_num()).sum(dim=1)  # banned tokens are -inf in both
        total = kl.new_zeros(len(due)).index_add(0, fresh.row, kl)
        drift = total / fresh.row.bincount(minlength=len(due)).clamp(min=1)
        over = [i for i, (row, d) in enumerate(zip(rows, drift.tolist(), strict=True)) if d > row.config.cache_drift]
        if not over:
            return cached
        self.cache.adopt(trial, due_step.index[over], ids.new_tensor(over))
        self.is_stored[due_step.index[over]] |= self._visible(due_step)[over]
        for i in over:
            rows[i].cost.cache_refreshes += 1
            rows[i].cache_age = 1
        replaced = [due[i] for i in over]
        kept = [i for i in range(len(step.places)) if i not in replaced]
        parts = [(replaced, fresh.of_rows(over, len(due)))]
        if kept:
            parts.append((kept, cached.of_rows(kept, len(step.places))))
        return merge(parts, window)

    def _cached_window(self, step: Step, window: Tensor) -> Tensor:
        """(R, T) bool: columns that a cached pass computes: the block and the rows that score it, or all behind."""
        canvas = self.canvas
        columns = canvas.take(canvas.block, step) == step.block
        row, column = window.nonzero(as_tuple=True)
        columns[row, canvas.take(canvas.source, step)[row, column]] = True
        first = columns.int().argmax(dim=1, keepdim=True)
        behind = torch.arange(columns.shape[1], device=columns.device) >= first
        columns |= behind & canvas.take(self.is_prefix, step)[:, None]
        return columns & self._visible(step)

    def _refresh_window(self, step: Step, window: Tensor) -> Tensor | None:
        """(R, T) bool: columns that a refresh computes: around the block and what was never stored; None for all."""
        visible = self._visible(step)
        stored = self.is_stored[step.index]
        self.is_stored[step.index] = stored | visible
        if self.refresh_width is None:
            return None
        needed = self._cached_window(step, window)
        position = self.canvas.take(self.canvas.position_ids, step)
        last = position.masked_fill(~needed, -1).amax(dim=1, keepdim=True)
        first = position.masked_fill(~needed, position.shape[1]).amin(dim=1, keepdim=True)
        width = self.canvas.take(self.refresh_width, step)[:, None]
        near = (position >= first - width) & (position <= last + width)
        return visible & (near | needed | ~stored)

    def _visible(self, step: Step) -> Tensor:
        """(R, T) bool: real positions, without the masks that `suffix_window` forgets."""
        canvas = self.canvas
        real = canvas.take(canvas.attention_mask, step).bool()
        if not self.is_windowed:
            return real
        ends = []
        for row, commit in zip(self._rows(step), step.commits, strict=True):
            behind = row.config.suffix_window
            ends.append(FAR if behind is None else row.starts[commit.block + 1] + behind)
        return real & (canvas.take(canvas.ordinal, step) < step.index.new_tensor(ends)[:, None])

    def forward(
        self,
        step: Step,
        ids: Tensor,
        window: Tensor,
        cache: CanvasCache | None = None,
        computed: Tensor | None = None,
        trial_rows: bool = False,
    ) -> Scores:
        """Run the model on the rows, or on the `computed` columns of them, and score the window."""
        canvas = self.canvas
        # 1 which columns are computed
        visible = self._visible(step) if self.is_windowed else None
        if computed is None and cache is None:
            computed = visible
        position_ids = canvas.take(canvas.position_ids, step)
        columns = None
        if computed is not None and not bool(computed.all()):
            columns = Columns.of(computed)
        # 2 what they may attend to
        if cache is not None:
            all_rows = trial_rows or step.places == list(range(len(canvas.rows)))
            cache.bind(None if all_rows else step.index, None if columns is None else columns.index)
            key_mask = canvas.take(canvas.attention_mask, step).bool() if visible is None else visible
            if canvas.is_unpadded and visible is None:
                key_mask = None
        elif columns is not None:
            key_mask = columns.valid
        else:
            key_mask = None if canvas.is_unpadded else canvas.take(canvas.attention_mask, step)
        # 3 which rows of the result score what: of the window alone the head is run
        row, column = window.nonzero(as_tuple=True)  # (N,), (N,)
        scored = canvas.source[step.index[row], column]
        width = ids.shape[1] if columns is None else columns.index.shape[1]
        slot = scored if columns is None else columns.slot[row, scored]
        # 4 run
        self._count(step, None if computed is None else computed.sum(dim=1).tolist())
        logits = self.model(
            input_ids=ids if columns is None else columns.take(ids),
            attention_mask=key_mask,
            position_ids=position_ids if columns is None else columns.take(position_ids),
            past_key_values=cache,
            positions=row * width + slot,
            return_dict=True,
        ).logits
        return self._process(step, ids, Scores(row, column, logits))

    def _count(self, step: Step, num_tokens: list[int] | None) -> None:
        """Count a pass for the rows, some of which may stand in it more than once, and the columns that it computes."""
        self.forwards += 1
        rows = self._rows(step)
        num_tokens = [row.num_real for row in rows] if num_tokens is None else num_tokens
        for row, tokens in zip(rows, num_tokens, strict=True):
            row.cost.rows_evaluated += 1
            row.cost.tokens_evaluated += tokens
        for row in set(rows):
            row.cost.forwards += 1

    def _process(self, step: Step, ids: Tensor, scores: Scores) -> Scores:
        """Apply each row's biases, processors and bans to fresh logits."""
        parts = self.canvas.parts(step)
        is_filled = (self.canvas.take(self.canvas.ordinal, step) >= 0) & (
            ids != self.canvas.take(self.canvas.mask_ids, step)
        )
        filled = torch.where(is_filled, ids, -1)
        if not self.canvas.is_unpadded:  # what stands at padding is no text: a processor sees a mask there
            padding = self.canvas.take(self.canvas.attention_mask, step) == 0
            ids = torch.where(padding, self.canvas.take(self.canvas.mask_ids, step), ids)
        for positions in parts:
            row = self.canvas.rows[step.places[positions[0]]]
            part = scores if len(parts) == 1 else scores.of_rows(positions, len(step.places))
            ids_of_part = ids if len(parts) == 1 else ids[positions[0] : positions[-1] + 1]
            ids_of_part = ids_of_part[:, : row.width]
            if row.vocabulary.processors and ids_of_part.shape[1] < row.width:  # masks that no step has reached
                behind = (0, row.width - ids_of_part.shape[1])
                ids_of_part = torch.nn.functional.pad(ids_of_part, behind, value=row.config.mask_token_id)
            filled_of_part = filled if len(parts) == 1 else filled[positions[0] : positions[-1] + 1]
            logits = row.vocabulary.apply(part.logits, ids_of_part, part.row, filled_of_part)
            if len(parts) == 1:
                return scores._replace(logits=logits)
            if logits is not part.logits:  # a processor's; biases and bans are written into the view
                part.logits.copy_(logits)
        return scores


def even_parts(lengths: list[int]) -> list[list[int]]:
    """Places of rows of like lengths, in as many parts as cost least with padding and passes."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best: list[tuple[int, int]] = [(0, 0)]  # the least cost of the n shortest rows, and where its last part begins
    for n in range(1, len(order) + 1):
        widest = lengths[order[n - 1]]
        best.append(min((best[first][0] + (n - first) * widest + TOKENS_OF_A_PASS, first) for first in range(n)))
    parts, last = [], len(order)
    while last:
        parts.append(sorted(order[best[last][1] : last]))
        last = best[last][1]
    return parts


def merge(parts: list[tuple[list[int], Scores]], window: Tensor) -> Scores:
    """Put the scores of parts of the rows together in the order of the whole window."""
    row, column = window.nonzero(as_tuple=True)
    place = torch.full(window.shape, -1, dtype=torch.long, device=window.device)
    place[row, column] = torch.arange(len(row), device=window.device)
    logits = parts[0][1].logits.new_empty(len(row), parts[0][1].logits.shape[1])
    for positions, scores in parts:
        where = torch.tensor(positions, device=window.device)
        logits[place[where[scores.row], scores.column]] = scores.logits
    return Scores(row, column, logits)
