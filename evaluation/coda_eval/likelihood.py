"""Likelihood of a masked-diffusion model: a lower bound on log p(continuation | context), exact or estimated.

A masked-diffusion model defines log p only through an average over orders of unmasking. With S a set of masked
positions of the continuation and l = |S|, the bound is

    sum over S of  1 / (C(L, l) * l)  *  sum_{i in S} log p(x_i | context, x outside S),

which is log p itself where the conditionals agree with one joint distribution (the average over all orders; Ou et al.
2024, "Your Absorbing Discrete Diffusion Secretly Models the Conditional Distributions of Clean Data", section 3.3).
All 2^L - 1 sets are enumerated when they fit the budget; otherwise l is sampled systematically and S uniformly.

With attention by blocks log p is the sum over the blocks of log p(block | context, clean blocks before), and each of
these is bounded so. One input holds masks in all blocks, beside a clean copy that the later ones see, as in training.
Blocks of one token need one input, and their bound is log p.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from CoDALanguageModel.attention_coda import Visibility, block_starts, doubled
from CoDALanguageModel.candidates import ScoresNotFinite
from CoDALanguageModel.configuration_coda import CoDAConfig
from CoDALanguageModel.diffusion import named_rng, scored_by
from CoDALanguageModel.errors import UserError


@dataclass(frozen=True)
class LikelihoodBound:
    """A bound on log p in nats, and the standard error of its estimate: 0 where it is exact, None where it is unknown.

    It is unknown where one set of masks was drawn.
    """

    nats: float
    stderr: float | None


@dataclass(frozen=True)
class Layout:
    """A context and its continuation as the model reads them.

    With full attention this is the text; with attention by blocks a row `[noisy; clean]`, of which nothing is left out
    but noisy blocks before the continuation and the clean copy of its last block, which nothing depends on.
    """

    ids: list[int]
    targets: list[int]  # columns of the continuation, in the noisy half
    sources: list[int]  # columns whose rows of logits score them
    sizes: list[int]  # tokens of the continuation in each of its blocks
    places: list[int]  # of each column in the text
    facts: list[list[int]]  # of each column, see `Visibility`; none with full attention

    @classmethod
    def of(cls, context: list[int], continuation: list[int], config: CoDAConfig) -> "Layout":
        """Lay out a text whose blocks are counted as the configuration says, the continuation being its answer."""
        text, first, end = [*context, *continuation], len(context), len(context) + len(continuation)
        real = torch.ones(1, end, dtype=torch.long)
        if not config.has_blocks:
            source = scored_by(real, shift=config.logits_shift)[0, first:].tolist()
            return cls(text, list(range(first, end)), source, [len(continuation)], list(range(end)), [])
        answer_start = torch.tensor([[first]]) if config.block_origin == "answer" else None
        place = torch.arange(end)[None]
        start = block_starts(place, config.block_size, answer_start)
        rule = doubled(real, place, start, causal_context=config.causal_context)
        source = scored_by(None, rule.segment, shift=config.logits_shift, doubled_group=rule.group)[0].tolist()
        block = start[0].clamp(min=0).tolist()
        columns = [*range(block[first], end), *range(end, end + block[-1])]
        index = {column: i for i, column in enumerate(columns)}
        return cls(
            ids=[text[column % end] for column in columns],
            targets=[index[column] for column in range(first, end)],
            sources=[index[source[column]] for column in range(first, end)],
            sizes=[len(list(group)) for _, group in itertools.groupby(block[first:])],
            places=[column % end for column in columns],
            facts=[fact[0, columns].tolist() for fact in rule],
        )


@dataclass(frozen=True)
class MaskPlan:
    """Mask sets of one block of a continuation and the weight of each set's log-probability."""

    masked: np.ndarray  # (N, L) bool
    weights: np.ndarray  # (N,) float64: the bound is sum_n weights[n] * score[n]
    is_exact: bool


def plan_masks(length: int, mc_num: int, rng: np.random.Generator) -> MaskPlan:
    """Choose the mask sets of a continuation, or of what stands of it in one block.

    Args:
        length: tokens, L >= 1.
        mc_num: largest number of sets.
        rng: source of the sampled sets; not touched when all sets fit in `mc_num`.

    Returns:
        All sets, or `mc_num` sampled ones: l = floor(((u + j / n) mod 1) * L) + 1 for j < n, which gives every l
        the same chance (rounding a linspace does not), and for each l a uniform set. Weight L / (l * n).
        Generators in the same state give sets of like share and order of tokens whatever the length: u and the order
        of the first tokens are the same, so that what choices of several lengths have in common is scored alike.

    Raises:
        UserError: `length` or `mc_num` is not positive.
    """
    if length < 1 or mc_num < 1:
        raise UserError(f"length and mc_num must be positive, got {length} and {mc_num}")
    if length < 63 and 2**length - 1 <= mc_num:
        masked = np.array(list(itertools.product((False, True), repeat=length)))[1:]
        sizes = masked.sum(axis=1)
        return MaskPlan(masked, np.array([1 / (math.comb(length, size) * size) for size in sizes.tolist()]), True)
    fractions = (rng.random() + np.arange(mc_num) / mc_num) % 1.0
    sizes = np.floor(fractions * length).astype(int) + 1
    ranks = rng.random((length, mc_num)).argsort(axis=0).argsort(axis=0).T  # a row of draws for each token
    return MaskPlan(ranks < sizes[:, None], length / (sizes * mc_num), False)


def combine(plan: MaskPlan, scores: np.ndarray) -> LikelihoodBound:
    """The bound from each set's summed log-probability (N,); the error treats the samples as independent."""
    terms = plan.weights * scores
    if plan.is_exact or len(terms) == 1:
        return LikelihoodBound(float(terms.sum()), 0.0 if plan.is_exact else None)
    return LikelihoodBound(float(terms.sum()), float(terms.std(ddof=1) * math.sqrt(len(terms))))


def bound_log_likelihoods(
    model: nn.Module,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    mc_num: int,
    seed: int,
    batch_size: int,
    max_length: int,
) -> list[LikelihoodBound]:
    """Bounds for (context ids, continuation ids) pairs.

    Pairs with the same context share the draws of their mask sets, so that the choices of one question are compared on
    the same sets as far as their lengths allow. Inputs of several pairs are batched together.

    Raises:
        UserError: an empty context or continuation, a pair longer than `max_length`, or scores that are not finite.
    """
    for context, continuation in pairs:
        if not context or not continuation:
            raise UserError("a likelihood needs at least one context token and one continuation token")
        if len(context) + len(continuation) > max_length:
            raise UserError(
                f"a context of {len(context)} and a continuation of {len(continuation)} tokens exceed the context of "
                f"{max_length} tokens; texts are never cut"
            )
    layouts = [Layout.of(context, continuation, model.config) for context, continuation in pairs]
    plans = [
        [
            plan_masks(size, mc_num, named_rng("likelihood", seed, block, *context))
            for block, size in enumerate(layout.sizes)
        ]
        for layout, (context, _) in zip(layouts, pairs, strict=True)
    ]
    scores = [[np.zeros(len(plan.weights)) for plan in blocks] for blocks in plans]
    rows = [(pair, i) for pair, blocks in enumerate(scores) for i in range(max(map(len, blocks)))]
    rows.sort(key=lambda row: -len(layouts[row[0]].ids))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        masks = [[masks_of(plan, i) for plan in plans[pair]] for pair, i in batch]
        for (pair, i), found in zip(batch, _score(model, [layouts[pair] for pair, _ in batch], masks), strict=True):
            for score, value in zip(scores[pair], found, strict=False):
                if i < len(score):
                    score[i] = value
    bounds = [list(map(combine, *of_pair)) for of_pair in zip(plans, scores, strict=True)]
    return list(map(_sum, bounds))


def _sum(bounds: Sequence[LikelihoodBound]) -> LikelihoodBound:
    """The bound of a continuation from those of its blocks."""
    errors = [bound.stderr for bound in bounds]
    return LikelihoodBound(sum(bound.nats for bound in bounds), None if None in errors else math.hypot(*errors))


def masks_of(plan: MaskPlan, i: int) -> np.ndarray:
    """Set i of a plan; none where the plan has fewer than that of another block."""
    return plan.masked[i] if i < len(plan.masked) else np.zeros_like(plan.masked[0])


@torch.no_grad()
def _score(
    model: Callable[..., object], layouts: Sequence[Layout], masks: Sequence[Sequence[np.ndarray]]
) -> list[list[float]]:
    """Summed log-probability of the masked tokens of each block of each row; one forward pass, right-padded."""
    device, config = model.device, model.config
    longest, most = max(len(layout.ids) for layout in layouts), max(len(layout.sizes) for layout in layouts)

    def padded(rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])

    clean, real = padded([layout.ids for layout in layouts]), padded([[1] * len(layout.ids) for layout in layouts])
    masked, sources, groups = torch.zeros_like(real, dtype=torch.bool), torch.zeros_like(real), torch.zeros_like(real)
    for row, (layout, sets) in enumerate(zip(layouts, masks, strict=True)):
        masked[row, layout.targets] = torch.from_numpy(np.concatenate(sets))
        sources[row, layout.targets] = torch.tensor(layout.sources)
        groups[row, layout.targets] = torch.arange(len(sets)).repeat_interleave(torch.tensor(layout.sizes))
    rule: dict[str, Any] = {"attention_mask": real.to(device)}
    if config.has_blocks:
        facts = zip(*(layout.facts for layout in layouts), strict=True)
        rule = {"visibility": Visibility(*(padded(fact).to(device) for fact in facts))}
        rule["position_ids"] = padded([layout.places for layout in layouts]).to(device)
    rows, columns = masked.nonzero(as_tuple=True)  # (N,), (N,)
    logits: Tensor = model(
        input_ids=clean.masked_fill(masked, config.mask_token_id).to(device),
        positions=(rows * longest + sources[rows, columns]).to(device),  # after a context: >= 0
        return_dict=True,
        **rule,
    ).logits  # (N, V)
    log_probs = logits.float().log_softmax(dim=-1).cpu()
    picked = log_probs[torch.arange(len(rows)), clean[rows, columns]].double()
    if not bool(picked.isfinite().all()):  # a comparison of choices would take NaN for a score
        raise ScoresNotFinite
    total = torch.zeros(len(layouts) * most, dtype=torch.float64)
    return total.index_add(0, rows * most + groups[rows, columns], picked).view(-1, most).tolist()
