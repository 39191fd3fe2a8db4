"""One step of the rows of a canvas: score, choose, commit.

Not here: the forward pass (`scoring`), tokens (`candidates`), the rules of the choice (`orders`), several steps at once
(`speculation`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .candidates import Candidates, Extra, ScoresNotFinite, propose, row_uniforms, rows_at_once
from .canvas import Canvas, Decision, Step
from .decoding_settings import NUM_BEST
from .limits import Again, Limits
from .orders import choose
from .row import Row, Sampling
from .scoring import Scorer, Scores


class Stepwise:
    """Takes one denoising step of every row of a canvas per round."""

    extra: Extra | None = None
    """What else `margin` needs to know of each candidate."""

    def __init__(self, canvas: Canvas, scorer: Scorer):
        self.canvas, self.scorer = canvas, scorer

    def settle(self) -> None:
        """Let rows go and come."""
        source = self.canvas.settle()
        if source is not None:
            self.scorer.settle(source)

    def release(self, row: Row) -> None:
        """Let a row go, and what is stored for it."""
        self.canvas.release(row)
        self.scorer.release(row)

    def advance(self) -> None:
        """One round."""
        step = self.canvas.next_step()
        ids = self.canvas.take(self.canvas.ids, step)
        scores = self.scorer.score(step, ids)
        while step.places:
            try:
                decision = self.decide(step, ids, scores)
            except ScoresNotFinite as error:
                kept = self.fail(step, scores, error)
                if kept:
                    scores = scores.of_rows(kept, len(step.places))
                step, ids = step.keep(kept), ids[kept]
            else:
                self.canvas.commit(step, decision)
                return

    def fail(self, step: Step, scores: Scores, error: ScoresNotFinite) -> list[int]:
        """Give the error to the rows whose scores are not finite; returns the places of the others in the step."""
        faulty = set(scores.row[~scores.logits.float().amax(dim=1).isfinite()].tolist())
        for i in faulty:
            self.canvas.rows[step.places[i]].error = error
        return [i for i in range(len(step.places)) if i not in faulty]

    def decide(self, step: Step, ids: Tensor, scores: Scores) -> Decision:
        """Choose tokens and positions for each row from its scores.

        Raises:
            ScoresNotFinite: those of some row.
        """
        parts = self.canvas.parts(step)
        if len(parts) == 1:
            return self._decide(step, ids, scores)
        decisions = [
            self._decide(
                step.keep(positions),
                ids[positions[0] : positions[-1] + 1],
                scores.of_rows(positions, len(step.places)),
            )
            for positions in parts
        ]
        return Decision(*(_joined(column, decisions) for column in zip(*decisions, strict=True)))

    def _decide(self, step: Step, ids: Tensor, scores: Scores) -> Decision:
        """The same for rows that are treated alike."""
        row, column, logits = scores
        first: Row = self.canvas.rows[step.places[0]]
        how: Sampling = first.sampling
        mask = first.config.mask_token_id
        present = ids[row, column]
        draws = None
        if how.temperature > 0:
            draws = self._uniforms("token", step, ids.shape[1], row, column)
        candidates = propose(
            logits,
            how.order,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            uniforms=draws,
            present=present.masked_fill(present == mask, -1) if how.order.keeps_deciding else None,
            with_certainty=how.rule is not None,
            extra=self.extra,
        )
        remasked = self._remask(step, ids) if how.remask else None
        limits = None
        if first.constraint is not None:
            limits, again = self._limits(step, scores, remasked), self._again(step, ids.shape[1], scores)
            candidates = limits.correct(candidates, again)

        if how.is_forced:
            candidates = candidates._replace(tokens=self._forced(step, ids)[row, column])

        def spread(values: Tensor, fill: float | Tensor) -> Tensor:
            grid = fill.clone() if isinstance(fill, Tensor) else values.new_full(ids.shape, fill)
            grid[row, column] = values
            return grid

        shuffle = None
        if how.order.is_shuffled(how.alg_temp):
            shuffle = self._uniforms("order", step, ids.shape[1], row, column)
        rank = how.order.rank(candidates.confidence, how.alg_temp, shuffle)
        ranking = spread(rank, -torch.inf)
        counts = step.index.new_tensor([commit.count for commit in step.commits])
        if remasked is not None:
            counts = counts + remasked.sum(dim=1)
        chosen = choose(ranking, counts)
        margin = self.margin(how, candidates, ranking, counts, chosen, spread)
        accepted = None
        if how.rule is not None:
            certainty = spread(candidates.probability, -torch.inf), spread(candidates.entropy, torch.inf)
            accepted = how.rule.accept(how.bound, *certainty)
            chosen = chosen | accepted
        if limits is not None:
            also = None if accepted is None else accepted[row, column]
            is_chosen, tokens = limits.choose(rank, counts, also, again)
            chosen, candidates = spread(is_chosen, False), candidates._replace(tokens=tokens)
        log_probability = best = None
        if how.keeps_scores:
            chosen_logits = logits.gather(1, candidates.tokens[:, None]).squeeze(1).float()
            total = logits.float().logsumexp(dim=1)
            log_probability = spread(chosen_logits - total, 0.0)
            if how.keeps_best:
                best = self._best(logits, total, row, column, ids.shape)
        return Decision(chosen, spread(candidates.tokens, ids), remasked, log_probability, margin, best)

    def _best(self, logits: Tensor, total: Tensor, row: Tensor, column: Tensor, shape: torch.Size) -> Tensor:
        """(R, T, 2, K) float64: ids of the most probable tokens of each scored position, and log-probabilities."""
        values, tokens = logits.float().topk(min(NUM_BEST, logits.shape[1]), dim=1)
        best = values.new_zeros(*shape, 2, values.shape[1], dtype=torch.float64)
        best[row, column] = torch.stack([tokens.double(), (values - total[:, None]).double()], dim=1)
        return best

    def _forced(self, step: Step, ids: Tensor) -> Tensor:
        """(R, T) int64: what rows are to hold, for rows that are forced."""
        forced = torch.zeros_like(ids)
        for i, place in enumerate(step.places):
            tokens = ids.new_tensor(self.canvas.rows[place].request.forced)[: ids.shape[1]]
            forced[i, : len(tokens)] = tokens
        return forced

    def _limits(self, step: Step, scores: Scores, remasked: Tensor | None) -> Limits:
        """What the constraint of the rows allows; columns that are decided anew or masked again are open."""
        rows = [self.canvas.rows[place] for place in step.places]
        opened: list[set[int]] = [set() for _ in rows]
        if rows[0].sampling.order.keeps_deciding:
            for i, column in zip(scores.row.tolist(), scores.column.tolist(), strict=True):
                opened[i].add(column)
        if remasked is not None:
            for i, column in remasked.nonzero().tolist():
                opened[i].add(column)
        return Limits(rows, scores.row, scores.column, opened)

    def _again(self, step: Step, length: int, scores: Scores) -> Again:
        """What chooses tokens anew, of those that are allowed, for rows that are treated alike."""
        row, column, logits = scores
        first = self.canvas.rows[step.places[0]]
        how = first.sampling
        class_of = first.constraint.classes_on(logits.device)
        draws: dict[str, Tensor] = {}

        def again(name: str, where: list[int], kinds: Tensor) -> Candidates:
            if how.temperature > 0 and name not in draws:
                draws[name] = self._uniforms(name, step, length, row, column)
            at_once = rows_at_once(logits)
            parts = []
            for start in range(0, len(where), at_once):
                place = row.new_tensor(where[start : start + at_once])
                is_allowed = kinds[start : start + at_once].index_select(1, class_of)
                allowed = logits[place].masked_fill_(~is_allowed, -torch.inf)
                is_empty = ~allowed.amax(dim=1).isfinite()
                if bool(is_empty.any()):
                    logits[place[is_empty]] = -torch.inf
                    raise ScoresNotFinite("the logits processors exclude every token that the constraint allows")
                parts.append(
                    propose(
                        allowed,
                        how.order,
                        temperature=how.temperature,
                        top_p=how.top_p,
                        top_k=how.top_k,
                        uniforms=draws[name][place] if draws else None,
                    )
                )
            tokens, confidence = (torch.cat([part[i] for part in parts]) for i in (0, 1))
            return Candidates(tokens, confidence, None, None)

        return again

    def margin(
        self,
        how: Sampling,
        candidates: Candidates,
        ranking: Tensor,
        counts: Tensor,
        chosen: Tensor,
        spread: Callable[[Tensor, float], Tensor],
    ) -> Tensor | None:
        """(R,) how near to another choice each row is, for who wants to know; see `speculation`."""
        return None

    def _uniforms(self, name: str, step: Step, length: int, row: Tensor, column: Tensor) -> Tensor:
        """One draw per scored position, named by the row's seed, the step and the position in the text."""
        seeds = [self.canvas.rows[place].seed for place in step.places]
        draws = row_uniforms(name, seeds, [commit.step for commit in step.commits], length).to(row.device)
        return draws[row, self.canvas.position_ids[step.index[row], column]]

    def _remask(self, step: Step, ids: Tensor) -> Tensor:
        """(R, T) bool: committed tokens of the block to mask again (ReMDM, https://arxiv.org/abs/2503.00307).

        A token is masked again with probability `eta * sigma_max * share`, the share being that of the rule, where
        `sigma_max = min(1, s / (1 - t))` between the times t and s of the step; never at the last step of a block.
        """
        canvas, rows = self.canvas, [self.canvas.rows[place] for place in step.places]
        sigmas = []
        for row, commit in zip(rows, step.commits, strict=True):
            in_block = row.commits_of(commit.block)
            done = sum(c.count for c in in_block if c.step < commit.step)
            size = sum(c.count for c in in_block)
            t, s = 1 - done / size, 1 - (done + commit.count) / size
            sigmas.append(0.0 if t >= 1 else min(1.0, s / (1 - t)))
        decoded = (canvas.take(canvas.block, step) == step.block) & (ids != rows[0].config.mask_token_id)
        confidence = canvas.take(canvas.log_probability, step).exp()
        how = rows[0].sampling
        probability = how.remask(confidence, decoded) * (1.0 if how.eta is None else how.eta)
        probability = probability * torch.tensor(sigmas, device=ids.device)[:, None]
        row, column = decoded.nonzero(as_tuple=True)
        remasked = torch.zeros_like(decoded)
        remasked[row, column] = self._uniforms("remask", step, ids.shape[1], row, column) < probability[row, column]
        # What is masked again must fit in the schedule: at most as much as stays masked after the step.
        left = [
            sum(c.count for c in row.commits_of(m.block) if c.step > m.step)
            for row, m in zip(rows, step.commits, strict=True)
        ]
        return choose(torch.where(remasked, probability, -torch.inf), step.index.new_tensor(left))


def _joined(column: tuple[Tensor | None, ...], decisions: list[Decision]) -> Tensor | None:
    """One field of the decisions of parts, row after row; zeros where a part has none, None where no part has it."""
    present = next((x for x in column if x is not None), None)
    if present is None:
        return None
    return torch.cat(
        [
            present.new_zeros(len(d.chosen), *present.shape[1:]) if x is None else x
            for x, d in zip(column, decisions, strict=True)
        ]
    )
