"""One denoising step as pure functions: the schedule of commits, candidates with confidences, and the choice.

Everything is per row: no decision looks at another row of the batch. Not here: the loop and the model
(`stepwise`, `scoring`).
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .diffusion import named_rng
from .errors import UserError

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy", "p2")
"""Orders in which tokens are committed: at random, by probability of the token, by margin over the second best, by
negative entropy; and `p2`, which scores all tokens anew at each step and masks the worst again."""

ROUNDING = 1e-10
"""Far less than the spacing of float32 numbers near 1 (6e-8)."""

FIRST_SELECTION = 256
"""Tokens that the search for a top-p nucleus looks at first."""

MOST_STEPS = 512
"""More steps than this, and than there are masks, change nothing in a block. The published schedule then commits one
token a step as long as `steps * eps` is about 1/2, and beyond it leaves more and more tokens to its last step."""

ELEMENTS_AT_ONCE = 2**20
"""Scores that a CPU goes through at a time: intermediate results stay in its caches."""


class ScoresNotFinite(ValueError):
    """No token can be chosen by what the model gave."""


class Commit(NamedTuple):
    """What one forward pass does to a row."""

    step: int
    """Index of the denoising step; names the random draws of the row."""

    block: int
    """Block of the row that is being decoded."""

    count: int
    """Tokens to commit; for `p2` the tokens of the block that stay committed after the step."""


class Candidates(NamedTuple):
    """A proposed token for each scored position, judged under the tempered and filtered distribution."""

    tokens: Tensor
    """(N,) int64."""

    confidence: Tensor
    """(N,) float32, higher is committed earlier."""

    probability: Tensor | None
    """(N,) float32, of the token by the model itself, without temperature and filters; when asked for."""

    entropy: Tensor | None
    """(N,) float32, in nats, of the same distribution; when asked for."""

    margin: Tensor | None
    """(N,) float32, the error of the logits, in nats, that could give another token; when asked for."""

    sensitivity: Tensor | None
    """(N,) float32, bound on the change of the confidence per nat of error of the logits; when asked for."""


@lru_cache(maxsize=64)
def commit_counts(num_masked: int, steps: int, eps: float) -> tuple[int, ...]:
    """Tokens to commit at each of `steps` steps, in the published schedule.

    Times fall linearly from 1 to `eps`; step i commits `floor(masked * (1 - t[i+1] / t[i]))` tokens in float32 and the
    last step commits the rest (Dream's sampler, https://github.com/HKUNLP/Dream, which CoDA uses).

    Returns:
        `steps` counts that sum to `num_masked`; some may be zero.
    """
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float32)
    fractions = (1 - times[1:] / times[:-1]).numpy()
    counts, left = [], num_masked
    for fraction in fractions[:-1]:
        counts.append(int(np.float32(left) * fraction))
        left -= counts[-1]
    return (*counts, left)


@lru_cache(maxsize=64)
def plan_commits(num_masked: int, *, steps: int, block_length: int | None, eps: float, alg: str) -> tuple[Commit, ...]:
    """Plan all forward passes of one row; those that would change nothing are left out.

    Masked tokens are taken in blocks of `block_length` from left to right, the steps shared out evenly, the first
    blocks getting one more where they do not divide.

    Args:
        num_masked: masked tokens of the row.
        steps: denoising steps for the row. A block takes at most as many as it has masks, or `MOST_STEPS` if that is
            more, so that neither time nor memory grows with a number that a client may choose.
        block_length: masked tokens per block; None decodes all at once.
        eps: last time of the schedule.
        alg: one of `ALGORITHMS`.

    Raises:
        UserError: there are more blocks than steps.
    """
    if num_masked == 0:
        return ()
    length = min(block_length or num_masked, num_masked)
    num_blocks = math.ceil(num_masked / length)
    if steps < num_blocks:
        raise UserError(
            f"steps must be at least the number of blocks: {num_masked} masked tokens in blocks of "
            f"block_length={block_length} are {num_blocks} blocks, got steps={steps}"
        )
    plan, first_step = [], 0
    for block in range(num_blocks):
        size = min(length, num_masked - block * length)
        block_steps = min(steps // num_blocks + (block < steps % num_blocks), max(size, MOST_STEPS))
        if alg == "p2":  # kept after step i: size - floor(size * (1 - (i + 1) / steps)), in integers
            kept = [size - size * (block_steps - i - 1) // block_steps for i in range(block_steps)]
            counts = [k if k > previous else 0 for previous, k in zip([0, *kept], kept, strict=False)]
        else:
            counts = commit_counts(size, block_steps, eps)
        plan += [Commit(first_step + i, block, count) for i, count in enumerate(counts) if count]
        first_step += block_steps
    return tuple(plan)


def row_uniforms(name: str, seeds: list[int], steps: list[int], length: int) -> Tensor:
    """Uniform draws of a denoising step, one row of (R, `length`) float64 per (seed, step).

    Column p belongs to position p of the text, so that padding and the other rows change no draw.
    """
    draws = [named_rng(name, seed, step).random(length) for seed, step in zip(seeds, steps, strict=True)]
    return torch.from_numpy(np.stack(draws))


def propose(
    logits: Tensor,
    *,
    alg: str,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    uniforms: Tensor | None = None,
    present: Tensor | None = None,
    with_certainty: bool = False,
    with_margin: bool = False,
) -> Candidates:
    """Choose a token for each scored position and say how confident the model is in it.

    Args:
        logits: (N, V) aligned scores; ids that must not come out are -inf.
        alg: one of `ALGORITHMS`; `origin` has no confidence of its own and gives zeros.
        temperature: 0 takes the most probable token, otherwise tokens are drawn from softmax(logits / temperature).
        top_p: keep the most probable tokens up to this mass, the one that crosses it included; ties are kept.
        top_k: keep the k most probable tokens; ties are kept.
        uniforms: (N,) in [0, 1), one draw per position; needed when the temperature is not 0.
        present: (N,) int64, for `p2`: the committed token whose confidence is asked for, -1 where masked.
        with_certainty: also give probabilities and entropies.
        with_margin: also give the margins.

    Returns:
        Tokens and confidences; confidences are those of the tempered and filtered distribution, as published.

    Raises:
        ScoresNotFinite: a position has no finite score, or one that is not a number.
        ValueError: uniforms are missing.
    """
    at_once = max(1, ELEMENTS_AT_ONCE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    if len(logits) > at_once:
        options = {"alg": alg, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        options |= {"with_certainty": with_certainty, "with_margin": with_margin}
        parts = []
        for start in range(0, len(logits), at_once):
            part = slice(start, start + at_once)
            draws, tokens = (None if x is None else x[part] for x in (uniforms, present))
            parts.append(propose(logits[part], uniforms=draws, present=tokens, **options))
        return Candidates(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))
    scores = logits.float()
    if not bool(scores.amax(dim=-1).isfinite().all()):
        raise ScoresNotFinite("the model gave scores that are not finite: its weights or its precision are at fault")
    if temperature > 0:
        scores = scores / temperature
    ids = None  # of the columns below, where these are not the vocabulary
    if temperature > 0 and is_filtered(scores, top_p=top_p, top_k=top_k):
        ids, scores = kept_tokens(scores, top_p=top_p, top_k=top_k)
        weights = (scores - scores.amax(dim=-1, keepdim=True)).double().exp()
        cdf = weights.cumsum(dim=-1)  # token by token: empty columns at the end change nothing
        exact = weights / cdf[:, -1:]
        probabilities = exact.float()
        entropy = -torch.xlogy(exact, exact).cumsum(dim=-1)[:, -1].float() if alg == "entropy" else None
    else:
        scores = filter_scores(scores, top_p=top_p, top_k=top_k)
        probabilities = scores.softmax(dim=-1)
        cdf = probabilities.double().cumsum(dim=-1) if temperature > 0 else None
        entropy = entropies(probabilities) if alg == "entropy" else None
    margin = sensitivity = None
    if cdf is not None:
        if uniforms is None:
            raise ValueError(f"uniforms are needed with temperature {temperature}")
        threshold = uniforms.to(cdf)[:, None] * cdf[:, -1:]
        place = torch.searchsorted(cdf, threshold, right=True).clamp(max=cdf.shape[1] - 1)  # (N, 1)
        if with_margin:
            below = (place - 1).clamp(min=0)
            to_previous = torch.where(place > 0, threshold - cdf.gather(1, below), torch.inf)
            # A nat of error moves a cumulative probability F by at most 2 F (1 - F), which is at most 1 / 2.
            margin = 2 * torch.minimum(to_previous, cdf.gather(1, place) - threshold) / cdf[:, -1:]
            margin = margin.squeeze(1).float()
    else:
        place = probabilities.argmax(dim=-1, keepdim=True)
        if with_margin:
            margin = -scores.topk(2, dim=-1).values.diff(dim=-1).squeeze(1) / 2
    tokens = (place if ids is None else ids.gather(1, place)).squeeze(1)
    if present is not None:
        tokens = torch.where(present >= 0, present, tokens)
    if ids is None:
        probability = probabilities.gather(1, tokens[:, None]).squeeze(1)
    else:
        probability = probabilities.masked_fill(ids != tokens[:, None], 0).amax(dim=-1)
    best = probabilities.topk(2, dim=-1).values if alg == "topk_margin" else None
    if alg == "origin":
        confidence = torch.zeros_like(probability)
    elif alg in ("maskgit_plus", "p2"):
        confidence = probability
    elif alg == "topk_margin":
        confidence = -best.diff(dim=-1).squeeze(1)
    else:
        confidence = -entropy
    if with_margin:
        # |dp| <= 2 p (1 - p) and |dH| <= 2 H per nat, from dp_i = p_i (e_i - sum_j p_j e_j).
        if alg == "origin":
            sensitivity = torch.zeros_like(probability)
        elif alg == "entropy":
            sensitivity = 2 * entropy
        else:
            judged = probability[:, None] if best is None else best
            sensitivity = (2 * judged * (1 - judged)).sum(dim=-1)
        if temperature > 0:  # a nat of the logits is 1 / temperature nats of the scores
            sensitivity, margin = sensitivity / temperature, margin * temperature
    own_probability = own_entropy = None
    if with_certainty:
        own = logits.float().softmax(dim=-1)
        own_probability = own.gather(1, tokens[:, None]).squeeze(1)
        own_entropy = entropies(own)
    return Candidates(tokens, confidence, own_probability, own_entropy, margin, sensitivity)


def entropies(probabilities: Tensor) -> Tensor:
    """(N, V) float32 to (N,) nats. As exact as `torch.special.entr`, whose CPU kernel takes several times as long."""
    tiny = torch.finfo(torch.float32).tiny
    return -(probabilities.clamp_min(tiny).log_().mul_(probabilities).sum(dim=-1))


def nats(distance: Tensor, sensitivity: Tensor) -> Tensor:
    """The error of the logits, in nats, that could bridge a distance.

    Near certainty many float32 confidences are rounded to the same number, which a small error does not change: there
    an exact tie is as safe as any other order.
    """
    return (distance + ROUNDING) / sensitivity.clamp(min=torch.finfo(torch.float32).tiny)


def is_filtered(scores: Tensor, *, top_p: float | None, top_k: int | None) -> bool:
    """Whether `top_p` or `top_k` could leave a token out."""
    return (top_k is not None and top_k < scores.shape[-1]) or (top_p is not None and top_p < 1)


def filter_scores(scores: Tensor, *, top_p: float | None, top_k: int | None) -> Tensor:
    """Set scores outside of the top-p nucleus and of the top k to -inf, without sorting the vocabulary.

    Args:
        scores: (N, V) float32.
        top_p: mass of the nucleus; the token that crosses it is kept.
        top_k: number of tokens kept.

    Returns:
        (N, V); tokens that tie with the last one kept are kept too, so the order of ids has no influence.
    """
    if not is_filtered(scores, top_p=top_p, top_k=top_k):
        return scores
    _, _, lowest = _best_tokens(scores, top_p=top_p, top_k=top_k)
    return scores.masked_fill(scores < lowest, -torch.inf)


def kept_tokens(scores: Tensor, *, top_p: float | None, top_k: int | None) -> tuple[Tensor, Tensor]:
    """What `filter_scores` keeps, alone.

    Returns:
        Ids in ascending order and their scores, (N, K) each; columns that a row does not need are at its end, with the
        id V and the score -inf.
    """
    best, ids, lowest = _best_tokens(scores, top_p=top_p, top_k=top_k)
    left_out = best < lowest
    ids, order = ids.masked_fill(left_out, scores.shape[-1]).sort(dim=-1)
    return ids, best.masked_fill(left_out, -torch.inf).gather(1, order)


def _best_tokens(scores: Tensor, *, top_p: float | None, top_k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Enough of the best tokens to hold all that are kept: scores and ids (N, K), and the lowest score kept (N, 1)."""
    vocab_size = scores.shape[-1]
    is_nucleus = top_p is not None and top_p < 1
    if is_nucleus:
        top = scores.amax(dim=-1, keepdim=True)
        # Less than e^-80 of the largest term is lost in rounding, and an exponential that underflows is slow.
        total = (scores - top).clamp_min_(-80).exp_().sum(dim=-1, keepdim=True)
    width = min(max(FIRST_SELECTION, (top_k or 0) + 1), vocab_size)
    while True:
        best, ids = scores.topk(width, dim=-1)  # descending
        lowest = best.new_full((len(best), 1), -torch.inf)
        if top_k is not None and top_k < vocab_size:
            lowest = best[:, top_k - 1 : top_k]
        if is_nucleus:
            mass = (best - top).exp() / total
            kept = (mass.cumsum(dim=-1) - mass <= top_p).sum(dim=-1, keepdim=True)  # mass before the token
            lowest = torch.maximum(lowest, best.gather(1, kept - 1))
        if width == vocab_size or bool((best[:, -1:] < lowest).all()):  # ties with the lowest are among them
            return best, ids, lowest
        width = min(8 * width, vocab_size)


def order_scores(confidence: Tensor, alg: str, alg_temp: float | None, uniforms: Tensor | None) -> Tensor:
    """Turn confidences into the scores by which positions are ranked.

    With `alg_temp` the positions are drawn without replacement with probabilities softmax(confidence / alg_temp), by
    the Gumbel-top-k trick (Kool et al. 2019, https://arxiv.org/abs/1903.06059). `origin` ranks at random.

    Args:
        confidence: (N,) float32.
        alg: one of `ALGORITHMS`.
        alg_temp: randomness of the order; None or 0 takes the most confident first.
        uniforms: (N,) in [0, 1); needed by `origin` and by `alg_temp`.

    Returns:
        (N,) scores, higher first.
    """
    if alg == "origin":
        return uniforms.to(confidence.device)
    if not alg_temp:
        return confidence
    gumbel = -(-uniforms.clamp(min=1e-300).log()).log()
    return confidence.double() / alg_temp + gumbel.to(confidence.device)


def choose(scores: Tensor, counts: Tensor) -> Tensor:
    """Mark the `counts[b]` best positions of each row; ties go to the leftmost.

    Args:
        scores: (R, T) float, -inf where nothing can be chosen.
        counts: (R,) int64.

    Returns:
        (R, T) bool.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order))
    return (rank < counts[:, None]) & (scores > -torch.inf)


def accept(rule: str, bound: float, probability: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mark the positions that a parallel rule commits at once.

    `threshold`: probability of at least `bound` (Fast-dLLM, https://arxiv.org/abs/2505.22618). `factor`: the n most
    probable ones as long as the n-th has at least `1 - bound / (n + 1)` (ibid.). `entropy_bound`: the most certain
    ones as long as their entropies without the largest sum to at most `bound` nats (EB-Sampler,
    https://arxiv.org/abs/2505.24857).

    Args:
        rule: `threshold`, `factor` or `entropy_bound`.
        bound: its parameter.
        probability: (R, T) float32, of the proposed token; -inf where there is none.
        entropy: (R, T) float32, inf where there is none; for `entropy_bound`.

    Returns:
        (R, T) bool, and (R,) the error of the logits, in nats, that could decide some position the other way.
    """
    if rule == "threshold":
        accepted = probability >= bound
        margin = nats((probability - bound).abs(), 2 * probability * (1 - probability))
        return accepted, margin.masked_fill(probability.isinf(), torch.inf).amin(dim=1)
    if rule == "factor":
        ordered, order = probability.sort(dim=1, descending=True, stable=True)
        n = torch.arange(1, probability.shape[1] + 1, device=probability.device)
        distance = ordered - (1 - bound / (n + 1))
        margin = nats(distance.abs(), 2 * ordered * (1 - ordered))
    else:
        ordered, order = entropy.sort(dim=1, stable=True)
        before = ordered.cumsum(dim=1) - ordered
        distance = torch.where(ordered.isinf(), -torch.inf, bound - before)
        margin = nats(distance.abs(), 2 * before)
    # The bound tightens and the candidates worsen along the order, so what is accepted is a prefix.
    accepted = torch.zeros_like(probability, dtype=torch.bool).scatter_(1, order, distance >= 0)
    return accepted, margin.masked_fill(ordered.isinf(), torch.inf).amin(dim=1)
