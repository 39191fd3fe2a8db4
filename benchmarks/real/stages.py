"""The stages in their order, each with the function that does it and the seconds that it may take."""

from typing import NamedTuple


class Stage(NamedTuple):
    """A stage."""

    function: str
    """Module and function of this package, which a process of its own imports."""

    arguments: tuple[str, ...] = ()
    limit_s: float = 900.0
    """By default."""

    is_limited: bool = False
    """Whether `--limit` changes what it does."""


HOURS = 3600.0
STAGES = {
    "source": Stage("model:source"),
    "conversion": Stage("model:conversion"),
    "greedy": Stage("model:greedy"),
    "humaneval": Stage("roads:programs", ("coda_humaneval",), 12 * HOURS, True),
    "mbpp": Stage("roads:programs", ("coda_mbpp",), 12 * HOURS, True),
    "infilling": Stage("roads:infilling", (), 6 * HOURS, True),
    "serving": Stage("serving:serving"),
    "adaptation": Stage("adaptation:adaptation"),
}
