"""Several steps at once: drafted from old scores, verified in one pass; the tokens are those of `stepwise`.

One pass of many rows rounds otherwise than one of a row alone. A choice that so small an error could change is made
again from the row alone; how large the error must be is reckoned here, in nats of the logits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .candidates import Candidates, Distribution, ScoresNotFinite
from .canvas import Canvas, Decision, Step
from .orders import Order, nats
from .row import Row, Sampling
from .scoring import Scorer, Scores
from .stepwise import Stepwise


class Speculation(Stepwise):
    """Drafts steps from old scores and verifies them in one pass.

    Variant k of a row is the row after its first k drafted steps. As long as the true step, read off variant k, is
    the drafted one, variant k + 1 is the true canvas of the step after it; so by induction every committed step is
    the stepwise one. The drafts only decide how many steps one pass verifies.
    """

    def __init__(self, canvas: Canvas, scorer: Scorer):
        super().__init__(canvas, scorer)
        self.extra = doubts

    def advance(self) -> None:
        """Verify the drafts of all rows in one pass, and draft anew."""
        canvas = self.canvas
        # 1 the variants of all rows, side by side
        owners, variants, ahead, depth = [], [], [], []
        for place, row in enumerate(canvas.rows):
            ids, done = canvas.ids[place], 0
            owners.append(place), variants.append(ids), ahead.append(0), depth.append(0)
            for k, (columns, tokens) in enumerate(row.drafts):
                ids = ids.index_copy(0, columns, tokens)
                done += len(columns)
                if row.committed + done == len(row.gaps):
                    break  # nothing is left to score
                owners.append(place), variants.append(ids), ahead.append(done), depth.append(k + 1)
        # 2 one pass
        stacked = canvas.next_step(owners, ahead)
        ids = torch.stack(variants)
        scores = self.scorer.forward(stacked, ids, canvas.window(stacked, ids))
        # 3 commit true steps as long as they are the drafted ones
        where = {(place, k): i for i, (place, k) in enumerate(zip(owners, depth, strict=True))}
        alive, k, last = list(range(len(canvas.rows))), 0, {}
        while alive:
            positions = [where[place, k] for place in alive]
            step = canvas.next_step(alive)
            part = scores.of_rows(positions, len(owners))
            try:
                decision = self._guarded(step, canvas.take(canvas.ids, step), part)
            except ScoresNotFinite as error:
                alive = [alive[i] for i in self.fail(step, part, error)]
                continue
            canvas.commit(step, decision)
            for i, place in enumerate(alive):
                last[place] = part.of_rows([i], len(alive))
            drafted = [_is_drafted(canvas.rows[place], k, decision, i) for i, place in enumerate(alive)]
            alive = [place for i, place in enumerate(alive) if drafted[i] and not _is_over(canvas.rows[place])]
            k += 1
        # 4 draft anew
        for place, row in enumerate(canvas.rows):
            row.drafts = [] if _is_over(row) else self._draft(place, last[place])

    def margin(
        self,
        how: Sampling,
        candidates: Candidates,
        ranking: Tensor,
        counts: Tensor,
        chosen: Tensor,
        spread: Callable[[Tensor, float], Tensor],
    ) -> Tensor:
        """(R,) the least error of the logits, in nats, that could change tokens, positions or what a rule accepts."""
        of_token, sensitivity = candidates.extra
        margin = _ranking_margin(ranking, spread(sensitivity / (how.alg_temp or 1.0), 0.0), counts)
        if how.rule is not None:
            certainty = spread(candidates.probability, -torch.inf), spread(candidates.entropy, torch.inf)
            margin = torch.minimum(margin, how.rule.doubt(how.bound, *certainty))
            chosen = chosen | how.rule.accept(how.bound, *certainty)
        return torch.minimum(margin, spread(of_token, torch.inf).masked_fill(~chosen, torch.inf).amin(1))

    def _guarded(self, step: Step, ids: Tensor, scores: Scores) -> Decision:
        """Decide; where a choice is a near tie, decide again from the row alone, as the stepwise sampler sees it."""
        decision = self.decide(step, ids, scores)
        rows = [self.canvas.rows[place] for place in step.places]
        limits = decision.margin.new_tensor([row.config.near_tie for row in rows])
        for i in (decision.margin < limits).nonzero().squeeze(1).tolist():
            rows[i].cost.guard_hits += 1
            alone, row_ids = step.keep([i]), ids[i : i + 1]
            window = self.canvas.window(alone, row_ids)
            again = self.decide(alone, row_ids, self.scorer.forward(alone, row_ids, window))
            for mine, new in zip(decision, again, strict=True):
                if mine is not None:
                    mine[i] = new[0]
        return decision

    def _draft(self, place: int, scores: Scores) -> list[tuple[Tensor, Tensor]]:
        """Guess the row's next steps from the scores of its last one."""
        canvas, row, drafts, ahead = self.canvas, self.canvas.rows[place], [], 0
        ids = canvas.ids[place : place + 1].clone()
        while len(drafts) < row.config.speculate and row.committed + ahead < len(row.gaps):
            step = canvas.next_step([place], [ahead])
            window = canvas.window(step, ids)
            kept = window[0, scores.column]
            if not 0 < int(kept.sum()) == int(window.sum()):  # a new block: nothing is known about it yet
                break
            decision = self.decide(step, ids, Scores(scores.row[kept], scores.column[kept], scores.logits[kept]))
            columns = decision.chosen[0].nonzero().squeeze(1)
            tokens = decision.tokens[0, columns]
            drafts.append((columns, tokens))
            ids[0, columns] = tokens
            ahead += len(columns)
        return drafts


def _is_drafted(row: Row, k: int, decision: Decision, i: int) -> bool:
    """Whether step k of the row's draft is what was decided."""
    if k >= len(row.drafts):
        return False
    columns = decision.chosen[i].nonzero().squeeze(1)
    return torch.equal(columns, row.drafts[k][0]) and torch.equal(decision.tokens[i, columns], row.drafts[k][1])


def _is_over(row: Row) -> bool:
    return row.is_finished or row.error is not None


def doubts(
    distribution: Distribution, order: Order, tokens: Tensor, place: Tensor, uniforms: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(N,) float32 each: the error of the logits that could give another token, and the order's sensitivity to it."""
    temperature, cdf = distribution.temperature, distribution.cdf
    sensitivity = order.sensitivity(distribution, tokens)
    if cdf is None:
        return -distribution.scores.topk(2, dim=-1).values.diff(dim=-1).squeeze(1) / 2, sensitivity
    threshold = uniforms.to(cdf)[:, None] * cdf[:, -1:]
    to_previous = torch.where(place > 0, threshold - cdf.gather(1, (place - 1).clamp(min=0)), torch.inf)
    # A nat of error moves a cumulative probability F by at most 2 F (1 - F), which is at most 1 / 2.
    margin = 2 * torch.minimum(to_previous, cdf.gather(1, place) - threshold) / cdf[:, -1:]
    # A nat of the logits is 1 / temperature nats of the scores.
    return margin.squeeze(1).float() * temperature, sensitivity / temperature


def _ranking_margin(ranking: Tensor, sensitivity: Tensor, counts: Tensor) -> Tensor:
    """(R,) the error of the logits, in nats, that could swap the last position chosen and the first one that is not."""
    ordered, order = ranking.sort(dim=1, descending=True, stable=True)
    moved = sensitivity.gather(1, order)
    last, following = (counts - 1).clamp(min=0)[:, None], counts.clamp(max=ranking.shape[1] - 1)[:, None]
    gap = ordered.gather(1, last) - ordered.gather(1, following)
    margin = nats(gap.float(), moved.gather(1, last) + moved.gather(1, following))
    nothing_left = (counts[:, None] >= ranking.shape[1]) | ordered.gather(1, following).isinf()
    return margin.masked_fill(nothing_left, torch.inf).squeeze(1)
