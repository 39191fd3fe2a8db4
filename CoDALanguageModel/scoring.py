"""Scoring: one forward pass of some rows, whole or through the cache, to the logits of the positions to fill.

Not here: which rows and positions (`canvas`), and what becomes of the logits (`decoder`).
"""

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from .cache import CanvasCache, Columns
from .canvas import Canvas, Step
from .generation_config_coda import DiffusionGenerationConfig


@dataclass
class DecodingCost:
    """What an answer cost, counted over the batch."""

    forwards: int = 0
    """Forward passes of the model, one after the other."""

    rows_evaluated: int = 0
    """Rows in these passes."""

    tokens_evaluated: int = 0
    """Tokens in these rows, without padding to equal lengths."""

    tokens_committed: int = 0
    """Tokens that were filled in, end tokens included and tails behind them not."""

    cache_refreshes: int = 0
    """Rows whose keys and values were computed anew, the first time of each block included."""

    drift_checks: int = 0
    """Rows whose cached distributions were compared with fresh ones."""

    guard_hits: int = 0
    """Near ties that were computed again alone."""

    @property
    def tokens_per_forward(self) -> float:
        """Tokens committed per row evaluated: 1.0 is one token per step."""
        return self.tokens_committed / max(1, self.rows_evaluated)

    def as_dict(self) -> dict[str, float]:
        """All counts and the tokens per forward pass of a row, for logs and responses."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"tokens_per_forward": self.tokens_per_forward}


class Scores(NamedTuple):
    """Logits of the scored positions of some rows."""

    row: Tensor
    """(N,) int64, row among those of the step."""

    column: Tensor
    """(N,) int64."""

    logits: Tensor
    """(N, V), aligned: they score the token at (row, column)."""

    def of_rows(self, positions: list[int], num_rows: int) -> "Scores":
        """The part that belongs to some of the rows, renumbered from 0."""
        place = self.row.new_full((num_rows,), -1)
        place[positions] = torch.arange(len(positions), device=self.row.device)
        row = place[self.row]
        kept = row >= 0
        return Scores(row[kept], self.column[kept], self.logits[kept])


class Scorer:
    """Scores the positions of a canvas with the model, in the regime of the settings, and counts what it costs."""

    def __init__(self, model: Any, config: DiffusionGenerationConfig, canvas: Canvas, processors: LogitsProcessorList):
        self.model, self.config, self.canvas, self.processors = model, config, canvas, processors
        self.cost = DecodingCost()
        self.cache = CanvasCache(*canvas.ids.shape) if config.kv_cache != "none" else None
        self.cached_block = [-1] * len(canvas.ids)
        self.cache_age = [0] * len(canvas.ids)
        self.is_cached = torch.zeros_like(canvas.ids, dtype=torch.bool)  # columns whose keys and values are stored
        banned = {config.mask_token_id, *(config.suppress_tokens or ())}
        if config.pad_token_id is not None and config.pad_token_id not in canvas.eos_ids.tolist():
            banned.add(config.pad_token_id)
        self.banned_ids = canvas.ids.new_tensor(sorted(banned))
        bias = {int(token): float(value) for token, value in (config.logit_bias or {}).items()}
        self.bias_ids = canvas.ids.new_tensor(list(bias))
        self.bias = torch.tensor(list(bias.values()), device=canvas.ids.device)
        excluded = banned | {token for token, value in bias.items() if value == -math.inf}
        num_ids = min(config.num_token_ids or model.config.vocab_size, model.config.vocab_size)
        if len(excluded) >= num_ids and excluded.issuperset(range(num_ids)):
            raise ValueError(
                f"no token may come out: suppress_tokens and logit_bias exclude all of the {num_ids} ids of the "
                "vocabulary"
            )

    def score(self, step: Step, ids: Tensor) -> Scores:
        """Logits of the positions that the step may fill, from the cache where it is young enough."""
        window = self.canvas.window(step, ids)
        if self.cache is None:
            return self.forward(step, ids, window, None)
        is_fresh = [self._needs_refresh(row, commit.block) for row, commit in zip(step.rows, step.commits, strict=True)]
        fresh = [i for i, value in enumerate(is_fresh) if value]
        stale = [i for i, value in enumerate(is_fresh) if not value]
        parts = []
        for positions, refresh in ((fresh, True), (stale, False)):
            if positions:
                part_step = step if len(positions) == len(step.rows) else step.keep(positions)
                part_ids = ids if len(positions) == len(step.rows) else ids[positions]
                parts.append((positions, self._cached_scores(part_step, part_ids, window[positions], refresh)))
        return parts[0][1] if len(parts) == 1 else _merge(parts, window)

    def _needs_refresh(self, row: int, block: int) -> bool:
        interval = self.config.refresh_interval
        expired = interval is not None and self.cache_age[row] >= interval
        return self.cached_block[row] != block or expired

    def _cached_scores(self, step: Step, ids: Tensor, window: Tensor, refresh: bool) -> Scores:
        for row, commit in zip(step.rows, step.commits, strict=True):
            if refresh:
                self.cached_block[row], self.cache_age[row] = commit.block, 0
            self.cache_age[row] += 1
        if refresh:
            self.cost.cache_refreshes += len(step.rows)
            return self.forward(step, ids, window, self.cache, computed=self._refresh_window(step, window))
        cached = self.forward(step, ids, window, self.cache, computed=self._cached_window(step, window))
        if self.config.cache_drift is None:
            return cached
        due = [i for i, row in enumerate(step.rows) if (self.cache_age[row] - 1) % self.config.drift_interval == 0]
        return self._correct_drift(step, ids, window, cached, due) if due else cached

    def _correct_drift(self, step: Step, ids: Tensor, window: Tensor, cached: Scores, due: list[int]) -> Scores:
        """Compare cached with fresh distributions, and refresh the rows whose mean KL is over the budget."""
        self.cost.drift_checks += len(due)
        due_step, due_ids = step.keep(due), ids[due]
        trial = CanvasCache(len(due), ids.shape[1])
        fresh = self.forward(due_step, due_ids, window[due], trial, trial_rows=True)
        compared = cached.of_rows(due, len(step.rows))
        p, q = fresh.logits.float().log_softmax(dim=1), compared.logits.float().log_softmax(dim=1)
        kl = (p.exp() * (p - q).nan_to_num()).sum(dim=1)  # banned tokens are -inf in both
        total = kl.new_zeros(len(due)).index_add(0, fresh.row, kl)
        drift = total / fresh.row.bincount(minlength=len(due)).clamp(min=1)
        over = (drift > self.config.cache_drift).nonzero().squeeze(1).tolist()
        if not over:
            return cached
        self.cost.cache_refreshes += len(over)
        self.cache.adopt(trial, due_step.index[over], ids.new_tensor(over))
        self.is_cached[due_step.index[over]] |= self._visible(due_step)[over]
        for i in over:
            self.cache_age[due_step.rows[i]] = 1
        replaced = [due[i] for i in over]
        kept = [i for i in range(len(step.rows)) if i not in replaced]
        parts = [(replaced, fresh.of_rows(over, len(due)))]
        if kept:
            parts.append((kept, cached.of_rows(kept, len(step.rows))))
        return _merge(parts, window)

    def _cached_window(self, step: Step, window: Tensor) -> Tensor:
        """(R, T) bool: columns that a cached pass computes: the block and the rows that score it, or all behind."""
        canvas = self.canvas
        block = step.index.new_tensor([commit.block for commit in step.commits])[:, None]
        columns = canvas.take(canvas.block, step) == block
        if self._is_shifted:
            row, column = window.nonzero(as_tuple=True)
            columns[row, canvas.take(canvas.source, step)[row, column]] = True
        if self.config.kv_cache == "prefix":
            first = columns.int().argmax(dim=1, keepdim=True)
            index = torch.arange(columns.shape[1], device=columns.device)
            columns = (index >= first) & canvas.take(canvas.attention_mask, step).bool()
        return columns & self._visible(step)

    def _refresh_window(self, step: Step, window: Tensor) -> Tensor | None:
        """(R, T) bool: columns that a refresh computes: around the block and what was never stored; None for all."""
        visible = self._visible(step)
        stored = self.is_cached[step.index]
        self.is_cached[step.index] = stored | visible
        if self.config.refresh_window is None:
            return None
        needed = self._cached_window(step, window)
        position = self.canvas.take(self.canvas.position_ids, step)
        last = position.masked_fill(~needed, -1).amax(dim=1, keepdim=True)
        first = position.masked_fill(~needed, position.shape[1]).amin(dim=1, keepdim=True)
        width = self.config.refresh_window
        near = (position >= first - width) & (position <= last + width)
        return visible & (near | needed | ~stored)

    def _visible(self, step: Step) -> Tensor:
        """(R, T) bool: real positions, without the masks that `suffix_window` forgets."""
        canvas, config = self.canvas, self.config
        real = canvas.take(canvas.attention_mask, step).bool()
        if config.suffix_window is None:
            return real
        ends = [(commit.block + 1) * canvas.block_length + config.suffix_window for commit in step.commits]
        return real & (canvas.take(canvas.ordinal, step) < step.index.new_tensor(ends)[:, None])

    @property
    def _is_shifted(self) -> bool:
        return self.model.config.logits_shift

    def forward(
        self,
        step: Step,
        ids: Tensor,
        window: Tensor,
        cache: CanvasCache | None,
        computed: Tensor | None = None,
        trial_rows: bool = False,
    ) -> Scores:
        """Run the model on the rows, or on the `computed` columns of them, and score the window."""
        canvas = self.canvas
        visible = self._visible(step) if self.config.suffix_window is not None else None
        if computed is None and cache is None:
            computed = visible
        position_ids = canvas.take(canvas.position_ids, step)
        columns = None
        if computed is not None and not bool(computed.all()):
            columns = Columns.of(computed)
        row, column = window.nonzero(as_tuple=True)  # (N,), (N,)
        scored = canvas.source[step.index[row], column] if self._is_shifted else column
        if cache is not None:
            all_rows = trial_rows or step.rows == list(range(len(canvas.ids)))
            cache.bind(None if all_rows else step.index, None if columns is None else columns.index)
            key_mask = canvas.take(canvas.attention_mask, step).bool() if visible is None else visible
        elif columns is not None:
            key_mask = columns.valid
        else:
            key_mask = None if canvas.is_unpadded else canvas.take(canvas.attention_mask, step)
        if cache is not None and canvas.is_unpadded and visible is None:
            key_mask = None
        width = ids.shape[1] if columns is None else columns.index.shape[1]
        slot = scored if columns is None else columns.slot[row, scored]
        self.cost.forwards += 1
        canvas.count_pass(step)
        self.cost.rows_evaluated += len(ids)
        self.cost.tokens_evaluated += int(computed.sum()) if computed is not None else int(position_ids.numel())
        logits = self.model(
            input_ids=ids if columns is None else columns.take(ids),
            attention_mask=key_mask,
            position_ids=position_ids if columns is None else columns.take(position_ids),
            past_key_values=cache,
            positions=row * width + slot,
        ).logits
        return Scores(row, column, self._process(ids, row, logits))

    def _process(self, ids: Tensor, row: Tensor, logits: Tensor) -> Tensor:
        """Apply biases, processors and bans to fresh logits (N, V)."""
        if len(self.bias_ids):
            logits[:, self.bias_ids] += self.bias.to(logits)
        if self.processors:
            logits = self.processors(ids[row], logits)
        logits[:, self.banned_ids] = -torch.inf
        logits[:, self.config.num_token_ids :] = -torch.inf
        return logits


def _merge(parts: list[tuple[list[int], Scores]], window: Tensor) -> Scores:
    """Put the scores of parts of the rows together in the order of the whole window."""
    row, column = window.nonzero(as_tuple=True)
    place = torch.full(window.shape, -1, dtype=torch.long, device=window.device)
    place[row, column] = torch.arange(len(row), device=window.device)
    logits = parts[0][1].logits.new_empty(len(row), parts[0][1].logits.shape[1])
    for positions, scores in parts:
        where = torch.tensor(positions, device=window.device)
        logits[place[where[scores.row], scores.column]] = scores.logits
    return Scores(row, column, logits)
