"""Likelihood of a masked-diffusion model: a lower bound on log p(continuation | context), exact or estimated.

A masked-diffusion model defines log p only through an average over orders of unmasking. With S a set of masked
positions of the continuation and l = |S|, the bound is

    sum over S of  1 / (C(L, l) * l)  *  sum_{i in S} log p(x_i | context, x outside S),

which is log p itself where the conditionals agree with one joint distribution (the average over all orders; Ou et al.
2024, "Your Absorbing Discrete Diffusion Secretly Models the Conditional Distributions of Clean Data", section 3.3).
All 2^L - 1 sets are enumerated when they fit the budget; otherwise l is sampled systematically and S uniformly.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from CoDALanguageModel.diffusion import named_rng, scored_by
from CoDALanguageModel.errors import UserError


@dataclass(frozen=True)
class LikelihoodBound:
    """A bound on log p in nats, and the standard error of its estimate (0 where it is exact)."""

    nats: float
    stderr: float


@dataclass(frozen=True)
class MaskPlan:
    """Mask sets of one continuation and the weight of each set's log-probability."""

    masked: np.ndarray  # (N, L) bool
    weights: np.ndarray  # (N,) float64: the bound is sum_n weights[n] * score[n]
    is_exact: bool


def plan_masks(length: int, mc_num: int, rng: np.random.Generator) -> MaskPlan:
    """Choose the mask sets of a continuation.

    Args:
        length: tokens of the continuation, L >= 1.
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
    plans = [
        plan_masks(len(target), mc_num, named_rng("likelihood", seed, len(target), *context))
        for context, target in pairs
    ]
    scores = [np.zeros(len(plan.weights)) for plan in plans]
    rows = [(pair, sample) for pair, plan in enumerate(plans) for sample in range(len(plan.weights))]
    rows.sort(key=lambda row: -len(pairs[row[0]][0]) - len(pairs[row[0]][1]))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        for (pair, sample), score in zip(batch, _score(model, batch, pairs, plans), strict=True):
            scores[pair][sample] = score
    return [combine(plan, score) for plan, score in zip(plans, scores, strict=True)]


@torch.no_grad()
def _score(
    model: Callable[..., object],
    batch: Sequence[tuple[int, int]],
    pairs: Sequence[tuple[list[int], list[int]]],
    plans: Sequence[MaskPlan],
) -> list[float]:
    """Summed log-probability of the masked tokens of each row; one forward pass, right-padded."""
    device, mask_id = model.device, model.config.mask_token_id
    longest = max(len(pairs[pair][0]) + len(pairs[pair][1]) for pair, _ in batch)
    clean = torch.zeros((len(batch), longest), dtype=torch.long)
    real, masked = torch.zeros_like(clean), torch.zeros_like(clean, dtype=torch.bool)
    for row, (pair, sample) in enumerate(batch):
        context, target = pairs[pair]
        end = len(context) + len(target)
        clean[row, :end] = torch.tensor(context + target)
        real[row, :end] = 1
        masked[row, len(context) : end] = torch.from_numpy(plans[pair].masked[sample])
    rows, columns = masked.nonzero(as_tuple=True)  # (N,), (N,)
    scoring = rows * longest + scored_by(real, shift=model.config.logits_shift)[rows, columns]  # after a context: >= 0
    logits: Tensor = model(
        input_ids=clean.masked_fill(masked, mask_id).to(device),
        attention_mask=real.to(device),
        positions=scoring.to(device),
    ).logits  # (N, V)
    log_probs = logits.float().log_softmax(dim=-1).cpu()
    picked = log_probs[torch.arange(len(rows)), clean[rows, columns]].double()
    if not bool(picked.isfinite().all()):  # a comparison of choices would take NaN for a score
        raise UserError("the model gave scores that are not finite: its weights or its precision are at fault")
    return torch.zeros(len(batch), dtype=torch.float64).index_add(0, rows, picked).tolist()
