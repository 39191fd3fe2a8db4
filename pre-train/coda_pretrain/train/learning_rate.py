"""The learning rate as a pure function of the step. Masking probabilities have their own schedules (`noise`)."""

import math

from CoDALanguageModel.errors import UserError

from ..config import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, *, num_steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """The rate of optimizer step `step` (the first is 0); always positive.

    Warm-up step i of w uses (i + 1) / w of the peak. The decay, linear or half a cosine, covers the remaining d steps
    and would reach `min_ratio` one step after the last, so that even with `min_ratio` 0 no step is without effect.

    Args:
        step: in [0, num_steps).
        num_steps: optimizer steps of the whole run.
        optimizer: holds the peak.
        schedule: shape, warm-up and floor.

    Raises:
        UserError: the warm-up is longer than the run.
    """
    if schedule.warmup_steps > num_steps:
        raise UserError(
            f"schedule.warmup_steps must be at most the {num_steps} steps of the run, got {schedule.warmup_steps}"
        )
    peak = optimizer.learning_rate
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    done = min((step - schedule.warmup_steps) / max(num_steps - schedule.warmup_steps, 1), 1.0)  # in [0, 1)
    shape = 1.0 - done if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * (schedule.min_ratio + (1.0 - schedule.min_ratio) * shape)
