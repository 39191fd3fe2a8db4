"""Likelihood of a masked-diffusion model: a lower bound on log p(continuation | context), exact or estimated.

A masked-diffusion model defines log p only through an average over orders of unmasking. With S a set of masked
positions of the continuation and l = |S|, the bound is

    sum over S of  1 / (C(L, l) * l)  *  sum_{i in S} log p(x_i | context, x outside S),

which is log p itself where the conditionals agree with one joint distribution (the average over all orders; Ou et al.
2024, "Your Absorbing Discrete Diffusion Secretly Models the Conditional Distributions of Clean Data", section 3.3).
All 2^L - 1 sets are enumerated when they fit the budget; otherwise l is sampled systematically and S uniformly.

With attention by blocks log p is the sum over the blocks of log p(block | context, clean blocks before), and each of
these is bounded so. One input holds masks in all blocks, beside a clean copy that the later ones see, as in training
(Arriola et al. 2025, https://arxiv.org/abs/2503.09573). Blocks of one token need one input and have no bound but log p.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from CoDALanguageModel.attention_coda import block_causal, block_numbers
from CoDALanguageModel.configuration_coda import CoDAConfig
from CoDALanguageModel.diffusion import named_rng, scored_by
from CoDALanguageModel.errors import UserError


@dataclass(frozen=True)
class LikelihoodBound:
    """A bound on log p in nats, and the standard error of its estimate (0 where it is exact)."""

    nats: float
    stderr: float


@dataclass(frozen=True)
class Layout:
    """A context and its continuation as the model reads them.

    First the clean blocks that others see, then the blocks in which the continuation stands, whose tokens are masked.
    With full attention all is one block.
    """

    ids: list[int]
    places: list[int]  # of each id in the text
    blocks: list[int]  # of each id
    num_clean: int
    targets: list[int]  # columns of the continuation
    sources: list[int]  # columns whose rows of logits score them
    sizes: list[int]  # tokens of the continuation in each of its blocks

    @classmethod
    def of(cls, context: list[int], continuation: list[int], config: CoDAConfig) -> "Layout":
        """Lay out a text whose blocks are counted as the configuration says, the continuation being its answer."""
        text, start, end = [*context, *continuation], len(context), len(context) + len(continuation)
        block = [0] * end
        if config.has_blocks:
            answer_start = torch.tensor([start]) if config.block_origin == "answer" else None
            block = block_numbers(torch.arange(end), config.block_size, answer_start).tolist()
        first, last = block.index(block[start]), block.index(block[-1])
        source = scored_by(torch.ones(1, end), shift=config.logits_shift)[0].tolist()
        places = [*range(last), *range(first, end)]
        return cls(
            ids=[text[place] for place in places],
            places=places,
            blocks=[block[place] for place in places],
            num_clean=last,
            targets=[last + place - first for place in range(start, end)],
            sources=[  # of another block the clean copy
                source[place] + (last - first if block[source[place]] == block[place] else 0)
                for place in range(start, end)
            ],
            sizes=[len(list(group)) for _, group in itertools.groupby(block[start:])],
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
    ranks = rng.random((mc_num, length)).argsort(axis=1).argsort(axis=1)
    return MaskPlan(ranks < sizes[:, None], length / (sizes * mc_num), False)


def combine(plan: MaskPlan, scores: np.ndarray) -> LikelihoodBound:
    """The bound from each set's summed log-probability (N,); the error treats the samples as independent."""
    terms = plan.weights * scores
    if plan.is_exact or len(terms) < 2:
        return LikelihoodBound(float(terms.sum()), 0.0)
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

    Pairs with the same context and length share their mask sets, so that the choices of one question are compared on
    the same sets. Inputs of several pairs are batched together.

    Raises:
        UserError: an empty context or continuation, or a pair longer than `max_length`.
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
            plan_masks(size, mc_num, named_rng("likelihood", seed, size, *context, *([block] if block else [])))
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
    return [LikelihoodBound(sum(b.nats for b in of), math.hypot(*(b.stderr for b in of))) for of in bounds]


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
    clean = torch.zeros((len(layouts), longest), dtype=torch.long)
    real, masked, places, blocks = (torch.zeros_like(clean) for _ in range(4))
    sources, groups = torch.zeros_like(clean), torch.zeros_like(clean)
    for row, (layout, sets) in enumerate(zip(layouts, masks, strict=True)):
        width, targets = len(layout.ids), torch.tensor(layout.targets)
        clean[row, :width] = torch.tensor(layout.ids)
        places[row, :width], blocks[row, :width] = torch.tensor(layout.places), torch.tensor(layout.blocks)
        real[row, :width] = 1
        masked[row, targets] = torch.from_numpy(np.concatenate(sets)).long()
        sources[row, targets] = torch.tensor(layout.sources)
        groups[row, targets] = torch.arange(len(sets)).repeat_interleave(torch.tensor(layout.sizes))
    rule = {}
    if config.has_blocks:
        is_clean = torch.arange(longest) < torch.tensor([[layout.num_clean] for layout in layouts])
        visibility = block_causal(*(x.to(device) for x in (real, blocks, is_clean)))
        rule = {"visibility": visibility, "position_ids": places.to(device)}
    rows, columns = masked.nonzero(as_tuple=True)  # (N,), (N,)
    logits: Tensor = model(
        input_ids=clean.masked_fill(masked.bool(), config.mask_token_id).to(device),
        attention_mask=real.to(device),
        positions=(rows * longest + sources[rows, columns]).to(device),  # after a context: >= 0
        **rule,
    ).logits  # (N, V)
    log_probs = logits.float().log_softmax(dim=-1).cpu()
    picked = log_probs[torch.arange(len(rows)), clean[rows, columns]].double()
    if not bool(picked.isfinite().all()):  # a comparison of choices would take NaN for a score
        raise UserError("the model gave scores that are not finite: its weights or its precision are at fault")
    total = torch.zeros(len(layouts) * most, dtype=torch.float64)
    return total.index_add(0, rows * most + groups[rows, columns], picked).view(-1, most).tolist()
