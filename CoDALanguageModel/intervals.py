"""How sure a score is: the interval that goes with it in every report."""

import math

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
