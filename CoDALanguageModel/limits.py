"""A step of rows under a constraint: what the model proposes stands where it is allowed, and is chosen anew elsewhere.

A proposal that is allowed is the one of a row without constraint, and comes before all that had to be chosen anew; so a
row whose own answer matches gets that answer. Positions are committed one after the other, and what is allowed at the
rest is found anew after each. Not here: what is allowed (`constraints`).
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from .candidates import Candidates
from .row import Row

Again = Callable[[str, list[int], Tensor], Candidates]
"""Chooses anew for some of the scored positions: by the name of the draws, from classes of tokens, (n, C) bool."""


class Limits:
    """What the constraint of rows allows in one step.

    Args:
        rows: of the step; they have the same constraint.
        row: (N,) int64, the place in `rows` of each scored position.
        column: (N,) int64, its column.
        opened: of each row the columns that are masked, or may be again, before anything is committed.
    """

    def __init__(self, rows: Sequence[Row], row: Tensor, column: Tensor, opened: Sequence[Collection[int]]) -> None:
        self._row = row.tolist()
        self._device = row.device
        cells = [r.open_cells(columns) for r, columns in zip(rows, opened, strict=True)]
        self._places = [(cells[r], rows[r].cell_of[c]) for r, c in zip(self._row, column.tolist(), strict=True)]
        self._constraint = rows[0].constraint
        self._tokens: list[int] = []
        self._is_new: list[bool] = []

    def correct(self, candidates: Candidates, again: Again) -> Candidates:
        """Choose anew where the proposed token is not allowed. No rule takes such a token for certain."""
        self._tokens = candidates.tokens.tolist()
        self._is_new = [not cells.allows(i, self._kind(n)) for n, (cells, i) in enumerate(self._places)]
        where = [n for n, is_new in enumerate(self._is_new) if is_new]
        if not where:
            return candidates
        sets = [self._places[n][0].sets(self._places[n][1]) for n in where]
        number = {pair: k for k, pair in enumerate(dict.fromkeys(sets))}
        kinds = torch.from_numpy(np.stack([self._constraint.allowed(*pair) for pair in number])).to(self._device)
        new = again("token within", where, kinds[[number[pair] for pair in sets]])
        for n, token in zip(where, new.tokens.tolist(), strict=True):
            self._tokens[n] = token
        place = torch.tensor(where, device=self._device)
        return candidates._replace(
            tokens=candidates.tokens.index_copy(0, place, new.tokens),
            confidence=candidates.confidence.index_copy(0, place, new.confidence),
            probability=_filled(candidates.probability, place, -torch.inf),
            entropy=_filled(candidates.entropy, place, torch.inf),
        )

    def choose(self, rank: Tensor, counts: Tensor, accepted: Tensor | None, again: Again) -> tuple[Tensor, Tensor]:
        """Which of the scored positions are committed, and the tokens of all.

        What can no longer stand beside those committed before it stays masked, unless the step would commit too little:
        then it is chosen anew.

        Args:
            rank: (N,) higher is committed earlier.
            counts: (R,) int64, how many each row commits.
            accepted: (N,) bool, which others are committed too.
            again: chooses anew.

        Returns:
            (N,) bool and (N,) int64.
        """
        ranks, counts = rank.tolist(), counts.tolist()
        also = [False] * len(ranks) if accepted is None else accepted.tolist()
        chosen, left = [False] * len(ranks), list(counts)
        late: list[int] = []
        for n in sorted(range(len(ranks)), key=lambda n: (self._is_new[n], -ranks[n])):  # ties: leftmost first
            r = self._row[n]
            if left[r] <= 0 and not also[n]:
                continue
            cells, i = self._places[n]
            if cells.allows(i, self._kind(n)):
                cells.put(i, self._kind(n))
                chosen[n] = True
                left[r] -= 1
            else:
                late.append(n)
        for n in late:
            r = self._row[n]
            if left[r] > 0:
                cells, i = self._places[n]
                kinds = torch.from_numpy(self._constraint.allowed(*cells.sets(i)))[None].to(self._device)
                self._tokens[n] = int(again("token at last", [n], kinds).tokens)
                cells.put(i, self._kind(n))
                chosen[n] = True
                left[r] -= 1
        return torch.tensor(chosen, device=self._device), torch.tensor(self._tokens, device=self._device)

    def _kind(self, n: int) -> int:
        return int(self._constraint.class_of[self._tokens[n]])


def _filled(x: Tensor | None, place: Tensor, value: float) -> Tensor | None:
    return None if x is None else x.index_fill(0, place, value)
