"""How sure a score is: the interval that goes with it in every report."""

import math
from collections.abc import Sequence

import numpy as np

from .errors import UserError


def wilson_interval(share: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Interval of a binomial share, 95 % by default.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference". It stays in [0, 1]
    and is not empty at 0 or 1, where the normal interval is.

    Args:
        share: observed share in [0, 1].
        count: number of documents, positive. Means over several answers per document are treated as one each.
        z: quantile of the normal distribution.

    Raises:
        UserError: `share` or `count` is out of range.
    """
    if not 0.0 <= share <= 1.0 or count < 1:
        raise UserError(f"share must be in [0, 1] and count positive, got {share} and {count}")
    scale = 1.0 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1.0 - share) / count + z * z / (4 * count * count)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a mean over documents, from means of documents drawn anew with replacement.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13. It is empty where all values are
    the same, which says nothing of other documents.

    Args:
        values: one score for each document; the mean over its answers where it has several.
        level: share of the means that lie between the bounds.
        resamples: number of means.
        seed: of the draws; the interval is the same for the same seed.

    Raises:
        UserError: there are no values, or level or resamples is out of range.
    """
    if not values or not 0.0 < level < 1.0 or resamples < 1:
        raise UserError(
            f"values, level in (0, 1) and resamples >= 1 are needed, got {len(values)}, {level}, {resamples}"
        )
    scores, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    at_once = max(1, 2**20 // len(scores))
    sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    means = [scores[rng.integers(len(scores), size=(size, len(scores)))].mean(axis=1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [(1.0 - level) / 2, (1.0 + level) / 2])
    return float(low), float(high)
