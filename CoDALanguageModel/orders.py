"""The rules of the choice, by name: in which order positions are committed, which more at once, which are masked again.

Everything is per row: no decision looks at another row of the batch. A new rule is a class and a row of a table here.
Not here: tokens (`candidates`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from .candidates import Distribution

ROUNDING = 1e-10
"""Far less than the spacing of float32 numbers near 1 (6e-8)."""


class Order(ABC):
    """Says which positions are committed first."""

    keeps_deciding = False
    """Whether all tokens of a block are judged anew at each step, and the worst masked again."""

    @abstractmethod
    def confidence(self, distribution: Distribution, tokens: Tensor) -> Tensor:
        """(N,) float32, higher is committed earlier."""

    @abstractmethod
    def sensitivity(self, distribution: Distribution, tokens: Tensor) -> Tensor:
        """(N,) float32, bound on the change of the confidence per nat of error of the distribution's scores.

        From dp_i = p_i (e_i - sum_j p_j e_j): |dp| <= 2 p (1 - p) and |dH| <= 2 H per nat.
        """

    def is_shuffled(self, alg_temp: float | None) -> bool:
        """Whether `rank` needs uniforms."""
        return bool(alg_temp)

    def rank(self, confidence: Tensor, alg_temp: float | None, uniforms: Tensor | None) -> Tensor:
        """(N,) scores by which positions are ranked, higher first.

        With `alg_temp` the positions are drawn without replacement with probabilities softmax(confidence / alg_temp),
        by the Gumbel-top-k trick (Kool et al. 2019, https://arxiv.org/abs/1903.06059).

        Args:
            confidence: (N,) float32.
            alg_temp: randomness of the order; None or 0 takes the most confident first.
            uniforms: (N,) in [0, 1), where the order is shuffled.
        """
        if not alg_temp:
            return confidence
        gumbel = -(-uniforms.clamp(min=1e-300).log()).log()
        return confidence.double() / alg_temp + gumbel.to(confidence.device)


class Origin(Order):
    """At random."""

    def confidence(self, distribution: Distribution, tokens: Tensor) -> Tensor:
        """None of its own: zeros."""
        return torch.zeros(len(tokens), device=tokens.device)

    sensitivity = confidence

    def is_shuffled(self, alg_temp: float | None) -> bool:
        """Always."""
        return True

    def rank(self, confidence: Tensor, alg_temp: float | None, uniforms: Tensor | None) -> Tensor:
        """The uniforms themselves."""
        return uniforms.to(confidence.device)


class MaskgitPlus(Order):
    """By the probability of the token."""

    def confidence(self, distribution: Distribution, tokens: Tensor) -> Tensor:
        """The probability."""
        return distribution.probability(tokens)

    def sensitivity(self, distribution: Distribution, tokens: Tensor) -> Tensor:
        """Of the probability."""
        probability = distribution.probability(tokens)
        return 2 * probability * (1 - probability)


class TopkMargin(Order):
    """By the margin of the best token over the second best."""

    def confidence(self, distribution: Distribution, tokens: Tensor) -> Tensor:
        """The margin."""
        return -distribution.two_best.diff(dim=-1).squeeze(1)

    def sensitivity(self, distribution: Distribution, tokens: Tensor) -> Tensor:
        """Of both probabilities."""
        best = distribution.two_best
        return (2 * best * (1 - best)).sum(dim=-1)


class Entropy(Order):
    """By negative entropy."""

    def confidence(self, distribution: Distribution, tokens: Tensor) -> Tensor:
        """The negative entropy."""
        return -distribution.entropy

    def sensitivity(self, distribution: Distribution, tokens: Tensor) -> Tensor:
        """Of the entropy."""
        return 2 * distribution.entropy


class P2(MaskgitPlus):
    """By the probability of the token, all tokens of the block anew at each step."""

    keeps_deciding = True


ORDERS: dict[str, Order] = {
    "origin": Origin(),
    "maskgit_plus": MaskgitPlus(),
    "topk_margin": TopkMargin(),
    "entropy": Entropy(),
    "p2": P2(),
}
"""Values of `alg`."""


class Rule(ABC):
    """Says which positions a step commits besides those that its schedule asks for.

    `bound` is the parameter of the rule, `probability` (R, T) float32 that of the proposed tokens (-inf where there is
    none), `entropy` (R, T) float32 in nats (inf where there is none).
    """

    @abstractmethod
    def accept(self, bound: float, probability: Tensor, entropy: Tensor) -> Tensor:
        """(R, T) bool."""

    @abstractmethod
    def doubt(self, bound: float, probability: Tensor, entropy: Tensor) -> Tensor:
        """(R,) the error of the logits, in nats, that could decide some position the other way."""


class Threshold(Rule):
    """Probability of at least `bound` (Fast-dLLM, https://arxiv.org/abs/2505.22618)."""

    def accept(self, bound: float, probability: Tensor, entropy: Tensor) -> Tensor:
        """See the class."""
        return probability >= bound

    def doubt(self, bound: float, probability: Tensor, entropy: Tensor) -> Tensor:
        """See `Rule`."""
        margin = nats((probability - bound).abs(), 2 * probability * (1 - probability))
        return margin.masked_fill(probability.isinf(), torch.inf).amin(dim=1)


class Prefix(Rule):
    """A rule whose bound tightens and whose candidates worsen along an order, so that it accepts a prefix of it."""

    @abstractmethod
    def along(self, bound: float, probability: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(R, T) each: the order, how far each position in it is within the bound, and the change of that per nat."""

    def accept(self, bound: float, probability: Tensor, entropy: Tensor) -> Tensor:
        """See the class."""
        order, distance, _ = self.along(bound, probability, entropy)
        return torch.zeros_like(probability, dtype=torch.bool).scatter_(1, order, distance >= 0)

    def doubt(self, bound: float, probability: Tensor, entropy: Tensor) -> Tensor:
        """See `Rule`."""
        order, distance, sensitivity = self.along(bound, probability, entropy)
        is_none = probability.gather(1, order).isinf()
        return nats(distance.abs(), sensitivity).masked_fill(is_none, torch.inf).amin(dim=1)


class Factor(Prefix):
    """The n most probable ones as long as the n-th has at least `1 - bound / (n + 1)` (Fast-dLLM)."""

    def along(self, bound: float, probability: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Prefix`."""
        ordered, order = probability.sort(dim=1, descending=True, stable=True)
        n = torch.arange(1, probability.shape[1] + 1, device=probability.device)
        return order, ordered - (1 - bound / (n + 1)), 2 * ordered * (1 - ordered)


class EntropyBound(Prefix):
    """The most certain ones as long as their entropies without the largest sum to at most `bound` nats.

    EB-Sampler, https://arxiv.org/abs/2505.24857.
    """

    def along(self, bound: float, probability: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Prefix`."""
        ordered, order = entropy.sort(dim=1, stable=True)
        before = ordered.cumsum(dim=1) - ordered
        return order, torch.where(ordered.isinf(), -torch.inf, bound - before), 2 * before


RULES: dict[str, Rule] = {"threshold": Threshold(), "factor": Factor(), "entropy_bound": EntropyBound()}
"""By the setting that switches them on and is their bound."""


def least_confident(confidence: Tensor, decoded: Tensor) -> Tensor:
    """Softmax of the negative confidence over the decoded tokens (ReMDM-conf, https://arxiv.org/abs/2503.00307)."""
    return (-confidence).masked_fill(~decoded, -torch.inf).softmax(dim=1).nan_to_num()


REMASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"conf": least_confident}
"""Values of `remask`: of the probability (R, T) that each token had when it was committed and of what is decoded (R, T)
the share (R, T) of each token in what is masked again."""


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


def nats(distance: Tensor, sensitivity: Tensor) -> Tensor:
    """The error of the logits, in nats, that could bridge a distance.

    Near certainty many float32 confidences are rounded to the same number, which a small error does not change: there
    an exact tie is as safe as any other order.
    """
    return (distance + ROUNDING) / sensitivity.clamp(min=torch.finfo(torch.float32).tiny)
