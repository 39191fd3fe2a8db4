"""One round of decoding: score, choose, commit. `Decoder` takes one step at a time, `SpeculativeDecoder` several.

Not here: the forward pass (`scoring`) and the rules of the choice (`sampling`).
"""

import torch
from torch import Tensor

from .canvas import Canvas, Decision, Step
from .generation_config_coda import DiffusionGenerationConfig
from .sampling import accept, choose, nats, order_scores, propose, row_uniforms
from .scoring import Scorer, Scores


class Decoder:
    """Takes one denoising step of every unfinished row per round."""

    def __init__(self, config: DiffusionGenerationConfig, canvas: Canvas, scorer: Scorer):
        self.config, self.canvas, self.scorer = config, canvas, scorer

    def advance(self) -> None:
        """One round."""
        step = self.canvas.next_step()
        ids = self.canvas.take(self.canvas.ids, step)
        self.canvas.commit(step, self.decide(step, ids, self.scorer.score(step, ids)))

    def decide(self, step: Step, ids: Tensor, scores: Scores) -> Decision:
        """Choose tokens and positions for each row from its scores."""
        config, (row, column, logits) = self.config, scores
        temperature = 0.0 if config.do_sample is False else config.temperature
        present = ids[row, column]
        rule, guarded = config.parallel_rule, config.speculate > 0
        candidates = propose(
            logits,
            alg=config.alg,
            temperature=temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            uniforms=self._uniforms("token", step, ids.shape[1], row, column) if temperature > 0 else None,
            present=present.masked_fill(present == config.mask_token_id, -1) if config.alg == "p2" else None,
            with_certainty=rule is not None,
            with_margin=guarded,
        )

        def spread(values: Tensor, fill: float | Tensor) -> Tensor:
            grid = fill.clone() if isinstance(fill, Tensor) else values.new_full(ids.shape, fill)
            grid[row, column] = values
            return grid

        shuffled = config.alg == "origin" or config.alg_temp
        uniforms = self._uniforms("order", step, ids.shape[1], row, column) if shuffled else None
        ranking = spread(order_scores(candidates.confidence, config.alg, config.alg_temp, uniforms), -torch.inf)
        counts = step.index.new_tensor([commit.count for commit in step.commits])
        remasked = self._remask(step, ids) if config.remask else None
        if remasked is not None:
            counts = counts + remasked.sum(dim=1)
        chosen = choose(ranking, counts)
        margin = None
        if guarded:
            scale = config.alg_temp or 1.0
            margin = _ranking_margin(ranking, spread(candidates.sensitivity / scale, 0.0), counts)
            margin = torch.minimum(margin, spread(candidates.margin, torch.inf).masked_fill(~chosen, torch.inf).amin(1))
        if rule is not None:
            probability = spread(candidates.probability, -torch.inf)
            entropy = spread(candidates.entropy, torch.inf)
            accepted, distance = accept(rule, float(getattr(config, rule)), probability, entropy)
            chosen |= accepted
            margin = torch.minimum(margin, distance) if guarded else None
        log_probability = None
        if self.canvas.log_probability is not None:
            chosen_logits = logits.gather(1, candidates.tokens[:, None]).squeeze(1).float()
            log_probability = spread(chosen_logits - logits.float().logsumexp(dim=1), 0.0)
        return Decision(chosen, spread(candidates.tokens, ids), remasked, log_probability, margin)

    def _uniforms(self, name: str, step: Step, length: int, row: Tensor, column: Tensor) -> Tensor:
        """One draw per scored position, named by the row's seed, the step and the position in the text."""
        seeds = [self.canvas.seeds[r] for r in step.rows]
        draws = row_uniforms(name, seeds, [commit.step for commit in step.commits], length).to(row.device)
        return draws[row, self.canvas.position_ids[step.index[row], column]]

    def _remask(self, step: Step, ids: Tensor) -> Tensor:
        """(R, T) bool: committed tokens of the block to mask again (ReMDM-conf, https://arxiv.org/abs/2503.00307).

        A token is masked again with probability `eta * sigma_max * softmax(-confidence)`, where
        `sigma_max = min(1, s / (1 - t))` between the times t and s of the step; never at the last step of a block.
        """
        config, canvas = self.config, self.canvas
        plans = [canvas.plans[row] for row in step.rows]
        sigmas = []
        for plan, commit in zip(plans, step.commits, strict=True):
            in_block = [c for c in plan if c.block == commit.block]
            done = sum(c.count for c in in_block if c.step < commit.step)
            size = sum(c.count for c in in_block)
            t, s = 1 - done / size, 1 - (done + commit.count) / size
            sigmas.append(0.0 if t >= 1 else min(1.0, s / (1 - t)))
        block = step.index.new_tensor([commit.block for commit in step.commits])[:, None]
        decoded = (canvas.take(canvas.block, step) == block) & (ids != config.mask_token_id)
        confidence = canvas.take(canvas.log_probability, step).exp()
        share = (-confidence).masked_fill(~decoded, -torch.inf).softmax(dim=1).nan_to_num()
        strength = 1.0 if config.eta is None else config.eta
        probability = share * strength * torch.tensor(sigmas, device=ids.device)[:, None]
        row, column = decoded.nonzero(as_tuple=True)
        remasked = torch.zeros_like(decoded)
        remasked[row, column] = self._uniforms("remask", step, ids.shape[1], row, column) < probability[row, column]
        # What is masked again must fit in the schedule: at most as much as stays masked after the step.
        left = [
            sum(c.count for c in p if c.block == m.block and c.step > m.step)
            for p, m in zip(plans, step.commits, strict=True)
        ]
        return choose(torch.where(remasked, probability, -torch.inf), step.index.new_tensor(left))


class SpeculativeDecoder(Decoder):
    """Drafts steps from old scores and verifies them in one pass; the tokens are those of `Decoder`.

    Variant k of a row is the row after its first k drafted steps. As long as the true step, read off variant k, is
    the drafted one, variant k + 1 is the true canvas of the step after it; so by induction every committed step is
    the stepwise one. The drafts only decide how many steps one pass verifies.
    """

    def __init__(self, config: DiffusionGenerationConfig, canvas: Canvas, scorer: Scorer):
        super().__init__(config, canvas, scorer)
        self.drafts: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def advance(self) -> None:
        """Verify the drafts of all rows in one pass, and draft anew."""
        canvas = self.canvas
        rows = list(canvas.active)
        owners, variants, ahead, depth = [], [], [], []
        for row in rows:
            ids, done = canvas.ids[row], 0
            owners.append(row), variants.append(ids), ahead.append(0), depth.append(0)
            for k, (columns, tokens) in enumerate(self.drafts.get(row, [])):
                ids = ids.index_copy(0, columns, tokens)
                done += len(columns)
                if canvas.committed[row] + done == canvas.totals[row][-1]:
                    break  # nothing is left to score
                owners.append(row), variants.append(ids), ahead.append(done), depth.append(k + 1)
        stacked = canvas.next_step(owners, ahead)
        ids = torch.stack(variants)
        scores = self.scorer.forward(stacked, ids, canvas.window(stacked, ids), None)
        place = {(row, k): i for i, (row, k) in enumerate(zip(owners, depth, strict=True))}
        alive, k, last = rows, 0, {}
        while alive:
            positions = [place[row, k] for row in alive]
            step = canvas.next_step(alive)
            true_ids = canvas.take(canvas.ids, step)
            part = scores.of_rows(positions, len(owners))
            decision = self._guarded(step, true_ids, part)
            self.canvas.commit(step, decision)
            for i, row in enumerate(alive):
                last[row] = part.of_rows([i], len(alive))
            drafted = [self._is_drafted(row, k, decision, i) for i, row in enumerate(alive)]
            alive = [row for i, row in enumerate(alive) if drafted[i] and row in canvas.active]
            k += 1
        self.drafts = {row: self._draft(row, last[row]) for row in canvas.active}

    def _is_drafted(self, row: int, k: int, decision: Decision, i: int) -> bool:
        """Whether step k of the row's draft is what was decided."""
        drafts = self.drafts.get(row, [])
        if k >= len(drafts):
            return False
        columns = decision.chosen[i].nonzero().squeeze(1)
        return torch.equal(columns, drafts[k][0]) and torch.equal(decision.tokens[i, columns], drafts[k][1])

    def _guarded(self, step: Step, ids: Tensor, scores: Scores) -> Decision:
        """Decide; where a choice is a near tie, decide again from the row alone, as the stepwise sampler sees it."""
        decision = self.decide(step, ids, scores)
        near = (decision.margin < self.config.near_tie).nonzero().squeeze(1).tolist()
        for i in near:
            self.scorer.cost.guard_hits += 1
            alone = step.keep([i])
            row_ids = ids[i : i + 1]
            again = self.decide(
                alone, row_ids, self.scorer.forward(alone, row_ids, self.canvas.window(alone, row_ids), None)
            )
            for mine, new in zip(decision, again, strict=True):
                if mine is not None:
                    mine[i] = new[0]
        return decision

    def _draft(self, row: int, scores: Scores) -> list[tuple[Tensor, Tensor]]:
        """Guess the row's next steps from the scores of its last one."""
        canvas, drafts, ahead = self.canvas, [], 0
        ids = canvas.ids[row : row + 1].clone()
        while len(drafts) < self.config.speculate and canvas.committed[row] + ahead < canvas.totals[row][-1]:
            step = canvas.next_step([row], [ahead])
            window = canvas.window(step, ids)
            kept = window[0, scores.column]
            if int(kept.sum()) < int(window.sum()):  # a new block: nothing is known about it yet
                break
            decision = self.decide(step, ids, Scores(scores.row[kept], scores.column[kept], scores.logits[kept]))
            columns = decision.chosen[0].nonzero().squeeze(1)
            tokens = decision.tokens[0, columns]
            drafts.append((columns, tokens))
            ids[0, columns] = tokens
            ahead += len(columns)
        return drafts


def _ranking_margin(ranking: Tensor, sensitivity: Tensor, counts: Tensor) -> Tensor:
    """(R,) the error of the logits, in nats, that could swap the last position chosen and the first one that is not."""
    ordered, order = ranking.sort(dim=1, descending=True, stable=True)
    moved = sensitivity.gather(1, order)
    last, following = (counts - 1).clamp(min=0)[:, None], counts.clamp(max=ranking.shape[1] - 1)[:, None]
    gap = ordered.gather(1, last) - ordered.gather(1, following)
    margin = nats(gap.float(), moved.gather(1, last) + moved.gather(1, following))
    nothing_left = (counts[:, None] >= ranking.shape[1]) | ordered.gather(1, following).isinf()
    return margin.masked_fill(nothing_left, torch.inf).squeeze(1)
