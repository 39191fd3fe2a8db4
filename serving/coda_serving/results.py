"""Results of calls of earlier turns, brought to the order of the calls.

Chat templates write no ids, so that a model knows the result of one of several calls by its place alone. Not here:
calls in answers (`tools`).
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from .errors import invalid


class Part(NamedTuple):
    """A message of a conversation, or a part of one."""

    role: str
    text: str
    calls: tuple[str | None, ...] = ()
    """Ids of the calls that the text holds."""
    result_of: str | None = None
    """Id of the call whose result the text is."""


def in_order_of_calls(parts: Sequence[Part], name: str) -> list[Part]:
    """The same parts, the results among them in the order of the calls of the assistant's turn before.

    Results without ids stay as they stand.

    Args:
        parts: of a conversation.
        name: of the field that holds the id of a result's call.

    Raises:
        ApiError: a result is of no call of that turn, or of one that has its own, or its place would make it look like
            that of another call.
    """
    ordered: list[Part] = []
    calls: list[str | None] = []
    for is_assistants, turn in itertools.groupby(parts, lambda part: part.role == "assistant"):
        of_turn = list(turn)
        if is_assistants:
            calls = [call for part in of_turn for call in part.calls]
        else:
            results = iter(_sorted([part for part in of_turn if part.role == "tool"], calls, name))
            of_turn = [next(results) if part.role == "tool" else part for part in of_turn]
        ordered += of_turn
    return ordered


def _sorted(results: Sequence[Part], calls: Sequence[str | None], name: str) -> Sequence[Part]:
    of = {part.result_of for part in results}
    if of <= {None}:
        return results
    place = {call: i for i, call in reversed([*enumerate(calls)])}
    for part in results:
        if part.result_of is None:
            raise invalid(f"messages: all results of a turn need a {name}, or none of them", f"messages.{name}")
        if part.result_of not in place:
            known = f"its calls: {', '.join(map(repr, calls)):.200}" if calls else "it has none"
            raise invalid(
                f"messages: {name} {part.result_of!r:.80} names no call of the turn before ({known})",
                f"messages.{name}",
            )
    for call, count in Counter(part.result_of for part in results).items():
        if count > calls.count(call):  # some clients give all calls the same id
            raise invalid(f"messages: a call has one result, but {call!r:.80} has {count}", f"messages.{name}")
    ordered = sorted(results, key=lambda part: place[part.result_of])
    for call in calls[: place[ordered[-1].result_of]]:
        if call not in of:
            raise invalid(
                f"messages: the call {call!r:.80} has no result, and a later one of its turn has: results are known by "
                "their order",
                "messages",
            )
    return ordered
