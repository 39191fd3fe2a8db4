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


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, resamples: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean of documents' values: percentiles of the means of drawn sets of documents.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife". How often each distinct value is drawn is
    drawn at once, which has the same distribution as drawing documents and does not depend on their order.

    Args:
        values: one value per document; of differences the interval is the paired one.
        seed: of the draws.
        resamples: sets to draw.

    Raises:
        UserError: there are no values, or fewer than one set is to be drawn.
    """
    if not len(values) or resamples < 1:
        raise UserError(f"values must not be empty and resamples positive, got {len(values)} and {resamples}")
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    low, high = np.quantile(drawn @ distinct / len(values), (0.025, 0.975))
    return float(low), float(high)
