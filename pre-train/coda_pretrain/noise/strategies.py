"""How often each masking strategy is applied, and how that moves over a run.

Free of torch, so that a configuration is checked in a moment. Not here: drawing the noise
(`CoDALanguageModel.noise`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from CoDALanguageModel.errors import UserError


class MaskingProbabilities(NamedTuple):
    """Shares of the rows that each strategy of the report (section 4.1) is applied to, in [0, 1]."""

    prefix: float  # S1: a random prefix is never masked
    truncate: float  # S2: a random suffix is replaced by padding that is never masked
    span: float  # S3: tokens are masked in runs


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How rows are noised, and how the strategies' probabilities move over a run.

    S1 and S2 exclude each other in a row; S3 is drawn independently of both.
    """

    schedule: Literal["constant", "linear", "per_epoch"] = "constant"
    """`constant`: the three probabilities below. `linear`: from them at the start of the run to `linear_end` at
    its end. `per_epoch`: the rows of `per_epoch`, one an epoch, the last one for all later epochs."""

    prefix_probability: float = 0.0
    """S1: share of rows with a random prefix that is never masked."""

    truncate_probability: float = 0.0
    """S2: share of rows whose random suffix is replaced by padding."""

    span_probability: float = 0.0
    """S3: share of rows masked in runs."""

    linear_end: tuple[float, float, float] | None = None
    """(S1, S2, S3) at the end of the run; only with `schedule: linear`."""

    per_epoch: tuple[tuple[float, float, float], ...] = ()
    """(S1, S2, S3) of each epoch; only with `schedule: per_epoch`, which leaves the probabilities above at 0."""

    span_lengths: tuple[int, ...] = (2, 4, 8)
    """S3: run lengths k in tokens, each equally likely."""

    t_min: float = 1e-3
    """The smallest noise level drawn; the largest loss weight is its inverse."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UserError: a probability outside [0, 1], S1 and S2 together above 1, a value that the chosen schedule does
                not use, or one that it needs and does not have.
        """
        if self.linear_end is not None:
            object.__setattr__(self, "linear_end", tuple(self.linear_end))
        object.__setattr__(self, "per_epoch", tuple(tuple(row) for row in self.per_epoch))
        object.__setattr__(self, "span_lengths", tuple(self.span_lengths))
        if self.schedule not in ("constant", "linear", "per_epoch"):
            raise UserError(f"masking.schedule must be constant, linear or per_epoch, got {self.schedule!r}")
        if (self.linear_end is not None) != (self.schedule == "linear"):
            raise UserError(
                "masking.linear_end must be given with masking.schedule linear and only with it, "
                f"got schedule {self.schedule!r} and linear_end {self.linear_end}"
            )
        if bool(self.per_epoch) != (self.schedule == "per_epoch"):
            raise UserError(
                "masking.per_epoch must be given with masking.schedule per_epoch and only with it, "
                f"got schedule {self.schedule!r} and per_epoch {self.per_epoch}"
            )
        start = (self.prefix_probability, self.truncate_probability, self.span_probability)
        if self.schedule == "per_epoch" and any(start):
            raise UserError(
                "masking.prefix_probability, truncate_probability and span_probability have no effect with "
                f"masking.schedule per_epoch, leave them out; got {start}"
            )
        check_probabilities("prefix_probability, truncate_probability, span_probability", start)
        if self.linear_end is not None:
            check_probabilities("linear_end", self.linear_end)
        for epoch, row in enumerate(self.per_epoch):
            check_probabilities(f"per_epoch[{epoch}]", row)
        if not self.span_lengths or min(self.span_lengths) < 1:
            raise UserError(f"masking.span_lengths must list lengths of at least 1, got {self.span_lengths}")
        if not 0 < self.t_min < 1:
            raise UserError(f"masking.t_min must be in (0, 1), got {self.t_min}")

    def at(self, progress: float, epoch: int) -> MaskingProbabilities:
        """The probabilities at a point of the run.

        Args:
            progress: finished share of the run's steps, in [0, 1].
            epoch: number of the epoch, from 0.
        """
        if self.schedule == "per_epoch":
            return MaskingProbabilities(*self.per_epoch[min(epoch, len(self.per_epoch) - 1)])
        start = (self.prefix_probability, self.truncate_probability, self.span_probability)
        if self.linear_end is None:
            return MaskingProbabilities(*start)
        return MaskingProbabilities(*(a + (b - a) * progress for a, b in zip(start, self.linear_end, strict=True)))


def check_probabilities(name: str, values: Sequence[float]) -> None:
    """Check one (S1, S2, S3).

    Raises:
        UserError: not three numbers in [0, 1], or S1 + S2 above 1 (a row can have only one of them).
    """
    if len(values) != 3 or not all(0.0 <= value <= 1.0 for value in values):
        raise UserError(f"masking.{name} must be three probabilities (S1, S2, S3) in [0, 1], got {tuple(values)}")
    if values[0] + values[1] > 1.0:
        raise UserError(f"masking.{name}: S1 and S2 exclude each other, so S1 + S2 must be <= 1, got {tuple(values)}")
