"""A token for each scored position, and what the model thinks of it. Every position is judged by itself.

Not here: which positions are committed (`orders`).
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .diffusion import named_rng
from .errors import UserError

FIRST_SELECTION = 32
"""Tokens that the search for a top-p nucleus looks at first: enough for nearly all positions of a trained model."""

ELEMENTS_AT_ONCE = 2**20
"""Scores that a CPU goes through at a time: intermediate results stay in its caches."""

NOT_FINITE = (
    "the model gave scores that are not finite: its weights hold such numbers, its precision overflows (float16 does "
    "at 65504; bfloat16 and float32 do not), or a logits processor leaves no token"
)


class ScoresNotFinite(UserError):
    """No token can be chosen by what the model gave: its weights, its precision or a logits processor are at fault."""

    def __init__(self, message: str = NOT_FINITE):
        super().__init__(message)


class Distribution:
    """The probabilities of each position's tokens, tempered and filtered.

    Args:
        logits: (N, V) aligned scores; ids that must not come out are -inf.
        temperature: 0 leaves the scores as they are.
        top_p: keep the most probable tokens up to this mass, the one that crosses it included; ties are kept.
        top_k: keep the k most probable tokens; ties are kept.

    Attributes:
        ids: (N, K) int64, the tokens of the columns below in ascending order; None where they are the vocabulary.
        scores: (N, K) float32, -inf at what is left out.
        probabilities: (N, K) float32.
        cdf: (N, K) float64, up to a factor; None at temperature 0.

    Raises:
        ScoresNotFinite: a position has no finite score, or one that is not a number.
    """

    def __init__(self, logits: Tensor, temperature: float, top_p: float | None, top_k: int | None):
        scores = logits.float()
        if not bool(scores.amax(dim=-1).isfinite().all()):
            raise ScoresNotFinite
        self.temperature = temperature
        if temperature > 0:
            scores = scores / temperature
        self.ids = self._exact = self.cdf = None
        if temperature > 0 and is_filtered(scores, top_p=top_p, top_k=top_k):
            self.ids, self.scores = kept_tokens(scores, top_p=top_p, top_k=top_k)
            weights = (self.scores - self.scores.amax(dim=-1, keepdim=True)).double().exp()
            self.cdf = weights.cumsum(dim=-1)  # token by token: empty columns at the end change nothing
            self._exact = weights / self.cdf[:, -1:]
            self.probabilities = self._exact.float()
        else:
            self.scores = filter_scores(scores, top_p=top_p, top_k=top_k)
            self.probabilities = self.scores.softmax(dim=-1)
            if temperature > 0:
                self.cdf = self.probabilities.double().cumsum(dim=-1)

    def draw(self, uniforms: Tensor | None) -> Tensor:
        """Columns (N, 1) of the drawn tokens, one uniform of [0, 1) per position; at temperature 0 of the best ones.

        Raises:
            ValueError: uniforms are missing.
        """
        if self.cdf is None:
            return self.probabilities.argmax(dim=-1, keepdim=True)
        if uniforms is None:
            raise ValueError(f"uniforms are needed with temperature {self.temperature}")
        threshold = uniforms.to(self.cdf)[:, None] * self.cdf[:, -1:]
        return torch.searchsorted(self.cdf, threshold, right=True).clamp(max=self.cdf.shape[1] - 1)

    def tokens(self, place: Tensor) -> Tensor:
        """(N,) ids of columns (N, 1)."""
        return (place if self.ids is None else self.ids.gather(1, place)).squeeze(1)

    def probability(self, tokens: Tensor) -> Tensor:
        """(N,) float32 of ids (N,); 0 where an id is left out."""
        if self.ids is None:
            return self.probabilities.gather(1, tokens[:, None]).squeeze(1)
        return self.probabilities.masked_fill(self.ids != tokens[:, None], 0).amax(dim=-1)

    @cached_property
    def entropy(self) -> Tensor:
        """(N,) float32, in nats."""
        if self._exact is None:
            return entropies(self.probabilities)
        return -torch.xlogy(self._exact, self._exact).cumsum(dim=-1)[:, -1].float()

    @cached_property
    def two_best(self) -> Tensor:
        """(N, 2) float32, the largest probabilities."""
        return self.probabilities.topk(2, dim=-1).values


class Judge(Protocol):
    """What `propose` needs of an order."""

    def confidence(self, distribution: Distribution, tokens: Tensor) -> Tensor:
        """(N,) float32 for tokens (N,), higher is committed earlier."""


Extra = Callable[[Distribution, Judge, Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]
"""What else is asked of each position: of the distribution, the order, the tokens (N,), their columns (N, 1) and the
uniforms (N,); gives tensors (N,)."""


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

    extra: tuple[Tensor, ...] = ()
    """What `Extra` gave."""


def row_uniforms(name: str, seeds: list[int], steps: list[int], length: int) -> Tensor:
    """Uniform draws of a denoising step, one row of (R, `length`) float64 per (seed, step).

    Column p belongs to position p of the text, so that padding and the other rows change no draw.
    """
    draws = [named_rng(name, seed, step).random(length) for seed, step in zip(seeds, steps, strict=True)]
    return torch.from_numpy(np.stack(draws))


def rows_at_once(logits: Tensor) -> int:
    """Rows of (N, V) scores that are best gone through at a time."""
    return max(1, ELEMENTS_AT_ONCE // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))


def propose(
    logits: Tensor,
    order: Judge,
    *,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    uniforms: Tensor | None = None,
    present: Tensor | None = None,
    with_certainty: bool = False,
    extra: Extra | None = None,
) -> Candidates:
    """Choose a token for each scored position and say how confident the model is in it.

    Args:
        logits: (N, V) aligned scores; ids that must not come out are -inf.
        order: judges the tokens.
        temperature: 0 takes the most probable token, otherwise tokens are drawn from softmax(logits / temperature).
        top_p: see `Distribution`.
        top_k: see `Distribution`.
        uniforms: (N,) in [0, 1), one draw per position; needed when the temperature is not 0.
        present: (N,) int64, for orders that keep deciding: the committed token to be judged, -1 where masked.
        with_certainty: also give probabilities and entropies.
        extra: more to ask.

    Returns:
        Tokens and confidences; confidences are those of the tempered and filtered distribution, as published.

    Raises:
        ScoresNotFinite: a position has no finite score, or one that is not a number.
        ValueError: uniforms are missing.
    """
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    at_once = rows_at_once(logits)
    if len(logits) > at_once:
        options |= {"with_certainty": with_certainty, "extra": extra}
        parts = []
        for start in range(0, len(logits), at_once):
            part = slice(start, start + at_once)
            draws, tokens = (None if x is None else x[part] for x in (uniforms, present))
            parts.append(propose(logits[part], order, uniforms=draws, present=tokens, **options))
        *columns, extras = zip(*parts, strict=True)
        whole = [None if column[0] is None else torch.cat(column) for column in columns]
        return Candidates(*whole, tuple(torch.cat(column) for column in zip(*extras, strict=True)))
    distribution = Distribution(logits, **options)
    place = distribution.draw(uniforms)
    tokens = distribution.tokens(place)
    if present is not None:
        tokens = torch.where(present >= 0, present, tokens)
    probability = entropy = None
    if with_certainty:
        own = logits.float().softmax(dim=-1)
        probability, entropy = own.gather(1, tokens[:, None]).squeeze(1), entropies(own)
    more = () if extra is None else extra(distribution, order, tokens, place, uniforms)
    return Candidates(tokens, order.confidence(distribution, tokens), probability, entropy, more)


def entropies(probabilities: Tensor) -> Tensor:
    """(N, V) float32 to (N,) nats. As exact as `torch.special.entr`, whose CPU kernel takes several times as long."""
    tiny = torch.finfo(torch.float32).tiny
    return -(probabilities.clamp_min(tiny).log_().mul_(probabilities).sum(dim=-1))


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

    def select(rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        best, ids = scores[rows].topk(width, dim=-1)  # descending
        lowest = best.new_full((len(best), 1), -torch.inf)
        if top_k is not None and top_k < vocab_size:
            lowest = best[:, top_k - 1 : top_k]
        if is_nucleus:
            mass = (best - top[rows]).exp() / total[rows]
            kept = (mass.cumsum(dim=-1) - mass <= top_p).sum(dim=-1, keepdim=True)  # mass before the token
            lowest = torch.maximum(lowest, best.gather(1, kept - 1))
        return best, ids, lowest

    best, ids, lowest = select(slice(None))
    while width < vocab_size:
        # In the other rows all ties with the lowest are among the best.
        rows = (best[:, -1] >= lowest.squeeze(1)).nonzero().squeeze(1)
        if not len(rows):
            break
        known, width = width, min(8 * width, vocab_size)
        best = torch.nn.functional.pad(best, (0, width - known), value=-torch.inf)
        ids = torch.nn.functional.pad(ids, (0, width - known))
        best[rows], ids[rows], lowest[rows] = select(rows)
    return best, ids, lowest
