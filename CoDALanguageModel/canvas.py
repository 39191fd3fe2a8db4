"""The rows being decoded: their tokens, where their masks were, how far each one is, and when it is finished.

Not here: which tokens are chosen (`sampling`) and how they are scored (`generation_coda`).
"""

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .diffusion import predecessor_rows
from .generation_config_coda import DiffusionGenerationConfig
from .sampling import Commit, plan_commits


class DecodingStalled(RuntimeError):
    """A step committed nothing in a row, which would then be decoded for ever."""


class Step(NamedTuple):
    """One denoising step of some rows of the canvas."""

    rows: list[int]
    """Rows of the canvas."""

    index: Tensor
    """(R,) int64, the same."""

    commits: list[Commit]
    """What each row is to do."""

    def keep(self, positions: list[int]) -> "Step":
        """The step of a part of the rows, given by their places in this one."""
        where = self.index.new_tensor(positions)
        return Step([self.rows[i] for i in positions], self.index[where], [self.commits[i] for i in positions])


class Decision(NamedTuple):
    """What a step does to its rows."""

    chosen: Tensor
    """(R, T) bool: committed, or for `p2` kept."""

    tokens: Tensor
    """(R, T) int64: the token of each scored position, elsewhere the present one."""

    remasked: Tensor | None
    """(R, T) bool: masked again."""

    log_probability: Tensor | None
    """(R, T) float32: of the proposed token."""

    margin: Tensor | None
    """(R,) float32: the least error of the logits, in nats, that could have changed the decision."""


class Canvas:
    """The token ids of a batch and the progress of its rows.

    Args:
        inputs: (B, T) int64, prompts in which mask tokens are gaps.
        attention_mask: (B, T) int64, 0 at padding.
        config: the decoding settings, token ids filled in.
        decode: turns token ids into text, for the stop strings.
    """

    def __init__(
        self,
        inputs: Tensor,
        attention_mask: Tensor,
        config: DiffusionGenerationConfig,
        decode: Callable[[list[int]], str] | None = None,
    ):
        num_rows, self.prompt_length = inputs.shape
        new = inputs.new_full((num_rows, config.max_new_tokens), config.mask_token_id)
        self.config, self.decode = config, decode
        self.ids = torch.cat([inputs, new], dim=1)
        self.attention_mask = torch.cat([attention_mask, torch.ones_like(new)], dim=1)
        self.is_unpadded = bool(attention_mask.all())
        self.position_ids = (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        self.source = predecessor_rows(self.attention_mask)
        fillable = (self.ids == config.mask_token_id) & self.attention_mask.bool()
        self.ordinal = torch.where(fillable, fillable.long().cumsum(dim=1) - 1, -1)  # (B, T) masks left of it
        self.block_length = min(config.block_length or self.ids.shape[1], self.ids.shape[1])
        self.block = torch.where(fillable, self.ordinal // self.block_length, -1)  # (B, T)
        self.plans = [
            plan_commits(n, steps=config.steps, block_length=config.block_length, eps=config.eps, alg=config.alg)
            for n in fillable.sum(dim=1).tolist()
        ]
        self.totals = [list(accumulate(commit.count for commit in plan)) for plan in self.plans]
        self.committed = [0] * num_rows
        self.num_steps = [0] * num_rows
        self.num_forwards = [0] * num_rows
        self.active = [row for row, plan in enumerate(self.plans) if plan]
        self.seeds = list(config.seed) if isinstance(config.seed, (list, tuple)) else [config.seed] * num_rows
        eos = config.eos_token_id
        self.eos_ids = self.ids.new_tensor([] if eos is None else eos if isinstance(eos, (list, tuple)) else [eos])
        self.ends = [self.ids.shape[1]] * num_rows  # column behind the last token of the answer
        keeps_scores = config.output_scores or config.remask is not None
        self.log_probability = torch.zeros(self.ids.shape, device=inputs.device) if keeps_scores else None
        self.step_of_commit = torch.full_like(self.ids, -1) if config.output_scores else None

    def next_step(self, rows: list[int] | None = None, ahead: list[int] | None = None) -> Step:
        """What the next step does to the rows (all unfinished ones by default).

        Args:
            rows: rows of the canvas.
            ahead: tokens of each row that are assumed to be committed already.
        """
        rows = list(self.active) if rows is None else rows
        extra = [0] * len(rows) if ahead is None else ahead
        commits = [self._next_commit(row, more) for row, more in zip(rows, extra, strict=True)]
        return Step(rows, torch.tensor(rows, dtype=torch.long, device=self.ids.device), commits)

    def _next_commit(self, row: int, ahead: int) -> Commit:
        if not self.config.commits_are_final:
            return self.plans[row][self.num_steps[row]]
        done = self.committed[row] + ahead
        # Rows that are ahead of the schedule skip the steps that would commit nothing.
        place = bisect_right(self.totals[row], done)
        commit = self.plans[row][place]
        return commit._replace(count=self.totals[row][place] - done)

    def take(self, x: Tensor, step: Step) -> Tensor:
        """The rows of a step out of a (B, ...) tensor."""
        return x if step.rows == list(range(len(x))) else x.index_select(0, step.index)

    def window(self, step: Step, ids: Tensor) -> Tensor:
        """(R, T) bool: positions of the rows that the step scores."""
        block = step.index.new_tensor([commit.block for commit in step.commits])
        inside = self.take(self.block, step) == block[:, None]
        return inside if self.config.alg == "p2" else inside & (ids == self.config.mask_token_id)

    def count_pass(self, step: Step) -> None:
        """Count a forward pass for each of the rows."""
        for row in set(step.rows):
            self.num_forwards[row] += 1

    def num_filled(self) -> int:
        """Masks that were filled, up to the ends of the answers."""
        column = torch.arange(self.ids.shape[1], device=self.ids.device)
        answer = column < torch.tensor(self.ends, device=self.ids.device)[:, None]
        return int(((self.block >= 0) & (self.ids != self.config.mask_token_id) & answer).sum())

    def commit(self, step: Step, decision: Decision) -> None:
        """Store what a step decided, and retire the rows that are finished.

        Raises:
            DecodingStalled: nothing was chosen in a row although its plan asks for it in every step: the scores by
                which positions are ranked are not numbers.
        """
        counts = decision.chosen.sum(dim=1).tolist()
        for row, commit, count in zip(step.rows, step.commits, counts, strict=True):
            if not count:
                raise DecodingStalled(
                    f"step {commit.step} of row {row} committed none of {commit.count} tokens: its scores are not "
                    f"finite (alg {self.config.alg!r}, alg_temp {self.config.alg_temp}, temperature "
                    f"{self.config.temperature})"
                )
        ids = self.take(self.ids, step)
        updated = torch.where(decision.chosen, decision.tokens, ids)
        if self.config.alg == "p2":
            updated = torch.where(self.window(step, ids) & ~decision.chosen, self.config.mask_token_id, updated)
        if decision.remasked is not None:
            updated = torch.where(decision.remasked, self.config.mask_token_id, updated)
        self.ids = self._store(self.ids, step, updated)
        if self.log_probability is not None:
            old = self.take(self.log_probability, step)
            new = torch.where(decision.chosen, decision.log_probability, old)
            self.log_probability = self._store(self.log_probability, step, new)
        if self.step_of_commit is not None:
            steps = step.index.new_tensor([commit.step for commit in step.commits])[:, None]
            fresh = decision.chosen & (ids == self.config.mask_token_id)
            new = torch.where(fresh, steps, self.take(self.step_of_commit, step))
            self.step_of_commit = self._store(self.step_of_commit, step, new)
        for row, count in zip(step.rows, counts, strict=True):
            self.committed[row] += count
            self.num_steps[row] += 1
        self._retire(step, updated)

    def _store(self, x: Tensor, step: Step, rows: Tensor) -> Tensor:
        return rows if step.rows == list(range(len(x))) else x.index_copy(0, step.index, rows)

    def _retire(self, step: Step, ids: Tensor) -> None:
        """Take the finished rows out of `active`: no mask left, or an answer that can no longer change."""
        is_mask = ids == self.config.mask_token_id
        is_mask &= self.take(self.block, step) >= 0
        first_mask = self._first(is_mask).tolist()
        finished = set()
        for i, row in enumerate(step.rows):
            if self.config.commits_are_final:
                if not is_mask[i].any():
                    finished.add(row)
            elif self.num_steps[row] == len(self.plans[row]):
                finished.add(row)
        if self.config.commits_are_final:
            first_eos = self._first_eos(ids).tolist()
            for i, row in enumerate(step.rows):
                end = self._end_of_text(ids[i], first_mask[i], first_eos[i])
                if end is not None:
                    self.ends[row] = end
                    if self.config.eos_early_stop:
                        finished.add(row)
        self.active = [row for row in self.active if row not in finished]

    def _end_of_text(self, ids: Tensor, first_mask: int, first_eos: int) -> int | None:
        """Column behind the text of a row whose answer is complete, or None while it may go on.

        Committed tokens are final, so an end token or a stop string left of the first mask ends the answer for good.
        """
        end = first_eos + 1 if first_eos < min(first_mask, len(ids)) else None
        if self.config.stop_strings:
            last = first_eos if end is not None else first_mask
            new = ids[self.prompt_length : max(last, self.prompt_length)].tolist()
            if self._holds_stop(new):
                low, high = 1, len(new)  # the fewest tokens whose text holds a stop string
                while low < high:
                    middle = (low + high) // 2
                    low, high = (low, middle) if self._holds_stop(new[:middle]) else (middle + 1, high)
                return self.prompt_length + low
        return end

    def _holds_stop(self, ids: list[int]) -> bool:
        text = self.decode(ids)
        return any(stop in text for stop in self.config.stop_strings)

    @staticmethod
    def _first(marked: Tensor) -> Tensor:
        """(R,) first True column of each row, T where there is none."""
        return torch.where(marked.any(dim=1), marked.int().argmax(dim=1), marked.shape[1])

    def _first_eos(self, ids: Tensor) -> Tensor:
        is_eos = torch.isin(ids, self.eos_ids)
        is_eos[:, : self.prompt_length] = False
        return self._first(is_eos)

    def fill_tails(self) -> None:
        """Put the pad token behind the end of each answer."""
        if not self.config.commits_are_final:
            for row, first_eos in enumerate(self._first_eos(self.ids).tolist()):
                end = self._end_of_text(self.ids[row], self.ids.shape[1], first_eos)
                self.ends[row] = self.ids.shape[1] if end is None else end
        fill = self.config.pad_token_id
        if fill is None:
            fill = int(self.eos_ids[0]) if len(self.eos_ids) else None
        if fill is not None:
            column = torch.arange(self.ids.shape[1], device=self.ids.device)
            behind = column >= torch.tensor(self.ends, device=self.ids.device)[:, None]
            self.ids = self.ids.masked_fill(behind, fill)
