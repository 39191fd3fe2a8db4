"""Gaps in a text as people write them: `<gap>`, or `<gap:12>` for one of 12 tokens."""

import itertools
import re

from ..errors import UserError

GAP = re.compile(r"<gap(?::(\d+))?>")

LONGEST = 10**6
"""Tokens of a gap: more than any context has."""


def read_gaps(text: str, default_length: int | None) -> tuple[list[str], list[int | None]]:
    """Split a text at its marks: the pieces, and the length of each gap.

    Raises:
        UserError: there is no mark, or a length is none.
    """
    marks = list(GAP.finditer(text))
    if not marks:
        raise UserError("the text for --infill holds no <gap> or <gap:LENGTH>")
    for mark in marks:
        if mark[1] and (len(mark[1]) > len(str(LONGEST)) or not 1 <= int(mark[1]) <= LONGEST):
            raise UserError(f"the length of a gap must be in [1, {LONGEST}], got {mark[0][:40]}")
    borders = [0, *itertools.chain.from_iterable(mark.span() for mark in marks), len(text)]
    pieces = [text[borders[i] : borders[i + 1]] for i in range(0, len(borders), 2)]
    return pieces, [int(mark[1]) if mark[1] else default_length for mark in marks]
