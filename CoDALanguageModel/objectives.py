"""What a model may be trained for, and what goes with it. Free of torch, so that both trainers tell it at once."""

from collections.abc import Mapping

from .errors import UserError

OBJECTIVES = {"full": ("masked",), "block_causal": ("block", "joint")}
"""By the attention of the model; what they are stands in `noise`."""

EVERY_OBJECTIVE = sum(OBJECTIVES.values(), ())


def check_objective(
    objective: str,
    *,
    complementary: bool,
    autoregressive_weight: float | None,
    t_min: float,
    names: Mapping[str, str],
) -> None:
    """Refuse settings of an objective that do not go together.

    Args:
        objective: one of `EVERY_OBJECTIVE`.
        complementary: see `noise.Blocks`.
        autoregressive_weight: see `noise.Blocks`.
        t_min: the largest of a run's smallest levels.
        names: what each of these arguments is called where the user gave it.

    Raises:
        UserError: naming them.
    """
    if complementary and objective == "masked":
        raise UserError(f"{names['complementary']} needs {names['objective']} block or joint, got 'masked'")
    if complementary and t_min >= 0.5:
        raise UserError(
            f"{names['t_min']} must be below 0.5 with {names['complementary']}, whose levels lie between it and "
            f"1 - t_min, got {t_min}"
        )
    if (autoregressive_weight is None) == (objective == "joint"):
        raise UserError(
            f"{names['autoregressive_weight']} must be given with {names['objective']} joint and only with it, got "
            f"objective {objective!r} and {autoregressive_weight}"
        )
