"""The rows that are decoded together, as tensors: their tokens, where their masks were, and what a step does to them.

Rows join and leave between two steps. Not here: what is known of one row (`row`), which tokens are chosen (`stepwise`)
and how they are scored (`scoring`).
"""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from .row import Evidence, Row
from .schedule import Commit

EMPTY = {"ids": 0, "attention_mask": 0, "position_ids": 0, "column": 0, "source": 0, "ordinal": -1, "block": -1}
"""The (R, T) int64 tensors of a canvas, with what stands in them behind the end of a row: tokens, 1 at real ones, place
of each column in the text and column of each place, column whose row of logits scores a column, masks left of a mask
and its block."""


class Step(NamedTuple):
    """One denoising step of some rows of the canvas."""

    places: list[int]
    """Of the rows in the canvas."""

    index: Tensor
    """(R,) int64, the same."""

    commits: list[Commit]
    """What each row is to do."""

    block: Tensor
    """(R, 1) int64, the block that each row decodes."""

    def keep(self, positions: list[int]) -> "Step":
        """The step of a part of the rows, given by their places in this one."""
        where = self.index.new_tensor(positions)
        return Step(
            [self.places[i] for i in positions],
            self.index[where],
            [self.commits[i] for i in positions],
            self.block[where],
        )


class Decision(NamedTuple):
    """What a step does to its rows."""

    chosen: Tensor
    """(R, T) bool: committed, or for an order that keeps deciding kept."""

    tokens: Tensor
    """(R, T) int64: the token of each scored position, elsewhere the present one."""

    remasked: Tensor | None
    """(R, T) bool: masked again."""

    log_probability: Tensor | None
    """(R, T) float32: of the proposed token."""

    margin: Tensor | None
    """(R,) float32: the least error of the logits, in nats, that could have changed the decision."""

    best: Tensor | None = None
    """(R, T, 2, K) float64: ids of the most probable tokens of each scored position, and their log-probabilities."""


class Canvas:
    """The token ids of rows and all that a step needs to know of each position.

    A row stands at the left; what is behind it, as far as the widest row, is padding. With attention by blocks a canvas
    ends with the last block that is being decoded, and grows.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.rows: list[Row] = []
        self.waiting: list[Row] = []
        for name in EMPTY:
            setattr(self, name, torch.zeros(0, 0, dtype=torch.long, device=device))
        self.log_probability = torch.zeros(0, 0, device=device)
        self._whole: list[int] = []

    @property
    def present(self) -> list[Row]:
        """All rows that are being decoded or will be from the next step on."""
        return [row for row in (*self.rows, *self.waiting) if row.is_present]

    def settle(self) -> list[int] | None:
        """Let rows go and come: nothing of a row that has left stays, and the canvas is as wide as its rows need.

        Rows that are treated alike stand side by side, so that what belongs to them is a view.

        Returns:
            None if there was nothing to do; or the former place of each row, -1 for those that have come.
        """
        stay = [i for i, row in enumerate(self.rows) if row.is_present]
        come = [row for row in self.waiting if row.is_present]
        width = max((row.live for row in (*(self.rows[i] for i in stay), *come)), default=0)
        if len(stay) == len(self.rows) and not come and width <= self.ids.shape[1]:
            return None
        alike: dict[Hashable, list[tuple[int, Row]]] = {}
        for place, row in [*((i, self.rows[i]) for i in stay), *((-1, row) for row in come)]:
            alike.setdefault(row.key, []).append((place, row))
        source = [place for rows in alike.values() for place, _ in rows]
        self.rows = [row for rows in alike.values() for _, row in rows]
        self.group = [i for i, rows in enumerate(alike.values()) for _ in rows]
        self.waiting = []
        known = self.ids.shape[1]
        kept, new = ([i for i, place in enumerate(source) if (place < 0) == is_new] for is_new in (False, True))
        for name, fill in EMPTY.items():
            setattr(self, name, refit(getattr(self, name), source, width, fill))
        for places, first in ((new, 0), (kept, known)):
            if places and first < width:
                for name, columns in self._columns([self.rows[i] for i in places], first, width).items():
                    getattr(self, name)[places, first:] = columns
        self.log_probability = refit(self.log_probability, source, width, 0.0)
        self.is_unpadded = all(row.num_real == row.width == width for row in self.rows)
        self.mask_ids = self.ids.new_tensor([row.config.mask_token_id for row in self.rows])[:, None]  # (R, 1)
        keeps = [row.sampling.order.keeps_deciding for row in self.rows]
        self.keeps_deciding = torch.tensor(keeps, device=self.device)[:, None] if any(keeps) else None
        self._whole = list(range(len(self.rows)))
        return source

    def parts(self, step: Step) -> list[list[int]]:
        """The rows of a step that are treated alike, by their places in it; those of a part stand side by side."""
        if self.group[-1] == 0:
            return [list(range(len(step.places)))]
        parts: list[list[int]] = []
        for i, place in enumerate(step.places):
            if parts and self.group[place] == self.group[step.places[i - 1]]:
                parts[-1].append(i)
            else:
                parts.append([i])
        return parts

    def _columns(self, rows: list[Row], first: int, last: int) -> dict[str, Tensor]:
        """What the rows say of some columns, (R, last - first) each."""
        table = torch.tensor(list(EMPTY.values()))[:, None, None].repeat(1, len(rows), last - first)
        for i, row in enumerate(rows):
            facts = {"ids": torch.tensor(row.ids[first:last], dtype=torch.long), **row.facts}
            for j, name in enumerate(EMPTY):
                values = facts[name] if name == "ids" else facts[name][first:last]
                table[j, i, : len(values)] = values
        return dict(zip(EMPTY, table.to(self.device), strict=True))

    def next_step(self, places: list[int] | None = None, ahead: list[int] | None = None) -> Step:
        """What the next step does to rows (all by default).

        Args:
            places: of the rows in the canvas.
            ahead: tokens of each row that are assumed to be committed already.
        """
        places = self._whole if places is None else places
        extra = [0] * len(places) if ahead is None else ahead
        commits = [self.rows[i].next_commit(more) for i, more in zip(places, extra, strict=True)]
        index = torch.tensor(places, dtype=torch.long, device=self.device)
        return Step(places, index, commits, index.new_tensor([commit.block for commit in commits])[:, None])

    def take(self, x: Tensor, step: Step) -> Tensor:
        """The rows of a step out of a (B, ...) tensor."""
        return x if step.places == self._whole else x.index_select(0, step.index)

    def window(self, step: Step, ids: Tensor) -> Tensor:
        """(R, T) bool: positions of the rows that the step scores."""
        inside = self.take(self.block, step) == step.block
        unknown = ids == self.take(self.mask_ids, step)
        if self.keeps_deciding is not None:
            unknown |= self.take(self.keeps_deciding, step)
        return inside & unknown

    def commit(self, step: Step, decision: Decision) -> None:
        """Store what a step decided, and tell each row what has changed in it."""
        ids = self.take(self.ids, step)
        updated = torch.where(decision.chosen, decision.tokens, ids)
        masks = self.take(self.mask_ids, step)
        if self.keeps_deciding is not None:
            dropped = self.window(step, ids) & ~decision.chosen & self.take(self.keeps_deciding, step)
            updated = torch.where(dropped, masks, updated)
        if decision.remasked is not None:
            updated = torch.where(decision.remasked, masks, updated)
        self.ids = self._store(self.ids, step, updated)
        if decision.log_probability is not None:
            old = self.take(self.log_probability, step)
            new = torch.where(decision.chosen, decision.log_probability, old)
            self.log_probability = self._store(self.log_probability, step, new)
        place, column = (updated != ids).nonzero(as_tuple=True)
        counts = decision.chosen.sum(dim=1)
        numbers = torch.cat([counts, place, column, updated[place, column]]).tolist()  # all that goes to the host
        counts, rest = numbers[: len(step.places)], numbers[len(step.places) :]
        places, columns, tokens = (rest[i * len(place) : (i + 1) * len(place)] for i in range(3))
        evidence = self._evidence(step, decision, place, column)
        first = 0
        for i, (at, commit, count) in enumerate(zip(step.places, step.commits, counts, strict=True)):
            last = first
            while last < len(places) and places[last] == i:
                last += 1
            known = None if evidence is None else evidence[first:last]
            self.rows[at].take(commit, count, columns[first:last], tokens[first:last], known)
            first = last
        if any(self.rows[at].request.keeps_guesses for at in step.places):
            self._guess(step, decision, updated == masks)

    def _guess(self, step: Step, decision: Decision, masked: Tensor) -> None:
        """Tell the rows that ask for it what the step would have put at masks that stay; `masked` is (R, T) bool."""
        rows = [self.rows[at] for at in step.places]
        asks = step.index.new_tensor([row.request.keeps_guesses for row in rows])[:, None] > 0
        known = decision.tokens != self.take(self.mask_ids, step)
        known &= masked & asks & (self.take(self.block, step) == step.block)
        if decision.remasked is not None:  # these have not been scored
            known &= ~decision.remasked
        place, column = known.nonzero(as_tuple=True)
        tokens, values = decision.tokens[place, column].tolist(), decision.log_probability[place, column].tolist()
        for row in rows:
            row.guesses = {}
        for i, *guess in zip(place.tolist(), column.tolist(), tokens, values, strict=True):
            at, token, value = guess
            rows[i].guesses[at] = token, value

    def _evidence(self, step: Step, decision: Decision, place: Tensor, column: Tensor) -> list[Evidence] | None:
        """What the model thought of the tokens that have changed, where a row keeps it."""
        if decision.log_probability is None or not any(self.rows[at].keeps_evidence for at in step.places):
            return None
        values = decision.log_probability[place, column].tolist()
        at = place.tolist()
        best: list[tuple[tuple[int, float], ...]] = [()] * len(values)
        if decision.best is not None:
            keeps = [self.rows[i].sampling.keeps_best for i in step.places]
            pairs = decision.best[place, column].tolist()
            best = [
                tuple(zip(map(int, p[0]), p[1], strict=True)) if keeps[i] else ()
                for i, p in zip(at, pairs, strict=True)
            ]
        steps = [step.commits[i].step for i in at]
        return [Evidence(*each) for each in zip(values, steps, best, strict=True)]

    def _store(self, x: Tensor, step: Step, rows: Tensor) -> Tensor:
        return rows if step.places == self._whole else x.index_copy(0, step.index, rows)

    def release(self, row: Row) -> None:
        """Let a row go: it is computed no more, and its place is free."""
        if row.config.output_scores and row in self.rows:
            known = self.log_probability[self.rows.index(row), : row.width]
            row.log_probability = torch.nn.functional.pad(known, (0, row.width - len(known)))
        row.leave()


def refit(x: Tensor, source: list[int], width: int, fill: float) -> Tensor:
    """Rows `source` of (B, T, ...), at another width; -1 makes a new one. Behind the end of a row stands `fill`."""
    new = x.new_full((len(source), width, *x.shape[2:]), fill)
    kept = [i for i, place in enumerate(source) if place >= 0]
    if kept:
        columns = min(width, x.shape[1])
        new[kept, :columns] = x[[source[i] for i in kept], :columns]
    return new
