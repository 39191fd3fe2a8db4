"""Tools: functions that the model may call, in Qwen's (Hermes') format, and its calls in OpenAI's shape.

A call that is asked for is an answer by the schema of its function. Not here: which texts a schema takes
(`CoDALanguageModel.json_schema`).
"""

import dataclasses
import json
import re
import uuid
from collections import defaultdict
from collections.abc import Container
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from CoDALanguageModel.errors import half_surrogate

from .engine import Answer, Delta
from .errors import invalid
from .protocol import ChatRequest, Shape, Tool, Tooling
from .responses import (
    CalledFunction,
    CallingMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    Form,
    ToolCall,
    ToolCallDelta,
)

OPENING, CLOSING = "<tool_call>", "</tool_call>"
BEGINNING = f"{OPENING}\n"
"""How an answer begins that is a call."""

CALL = re.compile(rf"{OPENING}(.*?)(?:{CLOSING}|$)", re.DOTALL)


class Conversation(Protocol):
    """A request, whosever words it uses."""

    @property
    def shape(self) -> Shape | None:
        """What its answer must match, besides calls."""

    @property
    def tooling(self) -> Tooling:
        """What it says of tools."""


def shape_of(body: Conversation) -> Shape | None:
    """What a conversation's answer must match: what its own fields say, or a call that is asked for.

    Raises:
        ApiError: two of them, or a tool that there is not.
    """
    shape, tooling = body.shape, body.tooling
    tools = tooling.callable
    if tooling.choice == "required" and not tooling.tools:
        raise invalid("tool_choice needs tools", param="tool_choice")
    if shape is not None and tools:
        raise invalid(f"{shape.param} cannot be used with tools: say tool_choice none", param=shape.param)
    if tooling.choice != "required":
        return shape
    if tooling.name is not None:
        tools = [tool for tool in tools if tool.function.name == tooling.name]
        if not tools:
            raise invalid(f"tool_choice names {tooling.name!r}, which is none of the tools", param="tool_choice")
    calls = [_call_schema(tool, f"#/anyOf/{i}") for i, tool in enumerate(tools)]
    return Shape("tools", {"json_schema": {"anyOf": calls}}, BEGINNING)


def _call_schema(tool: Tool, at: str) -> dict[str, Any]:
    """The schema of a call of one tool, which stands at the JSON pointer `at`."""
    parameters = tool.function.parameters or {"type": "object", "properties": {}}
    if parameters.get("type") != "object":
        raise invalid(f"tools: the parameters of {tool.function.name} must be of the type object", param="tools")
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.function.name},
            "arguments": _moved(parameters, f"{at}/properties/arguments"),
        },
        "required": ["name", "arguments"],
    }


def _moved(schema: Any, at: str) -> Any:
    """A schema whose references into itself hold at the place `at` of another."""
    if isinstance(schema, list):
        return [_moved(part, at) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {}
    for key, part in schema.items():
        if key == "$ref" and isinstance(part, str) and part[:1] == "#":
            moved[key] = f"{at}{part[1:]}"
        elif key in ("properties", "$defs", "definitions") and isinstance(part, dict):  # names, and no keywords
            moved[key] = {name: _moved(named, at) for name, named in part.items()}
        else:
            moved[key] = part if key in ("const", "enum") else _moved(part, at)  # values, and no schemas
    return moved


def form_of(body: ChatRequest, form: Form) -> Form:
    """How a conversation's answers are worded: calls are calls, and what matches its shape has not been cut."""
    calls = calls_of(body)
    if calls is not None:
        return _calling(form, calls)
    return form if shape_of(body) is None else completed(form)


def completed(form: Form) -> Form:
    """The same for answers that match their shape: one that fills its canvas is whole."""
    return dataclasses.replace(
        form,
        choice=lambda i, answer: form.choice(i, dataclasses.replace(answer, finish_reason="stop")),
        part=lambda i, delta, end: form.part(i, delta, end and "stop"),
    )


@dataclass(frozen=True)
class Calls:
    """How answers are read in which there may be calls."""

    names: frozenset[str]
    """Those of the tools."""
    is_call: bool
    """Whether an answer is a call, without its beginning."""
    is_parallel: bool
    """Whether there may be more calls than one; the first is kept otherwise."""

    def read(self, text: str) -> tuple[str, list[ToolCall]]:
        """The text before the calls of a whole answer, and the calls."""
        text, calls = read_calls(BEGINNING + text if self.is_call else text, self.names)
        return text, calls if self.is_parallel else calls[:1]


class CallReader:
    """Reads one answer of a stream as it becomes final.

    Args:
        calls: how it is read when it is whole.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._text = ""
        self._num_told = 0

    def more(self, text: str) -> str:
        """What is surely text, and no call, since more of the answer is known."""
        self._text += text
        return self._new("" if self._calls.is_call else _before_call(self._text))

    def end(self, text: str = "") -> tuple[str, list[ToolCall]]:
        """The rest of the text, and the calls, since all of the answer is known."""
        seen, calls = self._calls.read(self._text + text)
        return self._new(seen), calls

    def _new(self, seen: str) -> str:
        new = seen[self._num_told :]
        self._num_told = max(len(seen), self._num_told)
        return new


def calls_of(body: Conversation) -> Calls | None:
    """How a conversation's answers are read; None where there are no tools.

    Raises:
        ApiError: as `shape_of`.
    """
    shape, tooling = shape_of(body), body.tooling
    names = frozenset(tool.function.name for tool in tooling.callable)
    return Calls(names, shape is not None, tooling.is_parallel) if names else None


def _calling(form: Form, calls: Calls) -> Form:
    """Words for answers in which there may be calls."""
    readers: defaultdict[int, CallReader] = defaultdict(partial(CallReader, calls))

    def choice(index: int, answer: Answer) -> BaseModel:
        text, found = calls.read(answer.text)
        if not found:
            return form.choice(index, answer)
        message = CallingMessage(content=text or None, tool_calls=found)
        return ChatChoice(index=index, message=message, finish_reason="tool_calls")

    def part(index: int, delta: Delta, end: Literal["stop", "length"] | None) -> BaseModel | None:
        if end is None:
            new = readers[index].more(delta.text)
            return form.part(index, Delta(new), None) if new or delta.canvas is not None else None
        new, found = readers[index].end(delta.text)
        if not found:
            return form.part(index, Delta(new), end)
        deltas = [ToolCallDelta(index=i, **dict(call)) for i, call in enumerate(found)]
        added = ChatDelta(content=new or None, tool_calls=deltas)
        return ChatChunkChoice(index=index, delta=added, finish_reason="tool_calls")

    return dataclasses.replace(form, choice=choice, part=part)


def read_calls(text: str, names: Container[str]) -> tuple[str, list[ToolCall]]:
    """The text before the calls of an answer, and the calls.

    An answer in which a call is no JSON object with the name of a tool and an object of arguments is text: it has none.
    """
    calls = []
    for match in CALL.finditer(text):
        try:
            call = json.loads(match[1])
            if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
                return text, []
            arguments = json.dumps(call["arguments"], ensure_ascii=False, allow_nan=False)
        except (ValueError, RecursionError):
            return text, []
        name = call.get("name")
        if not isinstance(name, str) or name not in names or half_surrogate(arguments) is not None:
            return text, []
        function = CalledFunction(name=name, arguments=arguments)
        calls.append(ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", function=function))
    return (text.partition(OPENING)[0].rstrip() if calls else text), calls


def _before_call(text: str) -> str:
    """What of an answer that goes on surely stands before its first call, or is all of it."""
    before, found, _ = text.partition(OPENING)
    if not found:
        size = next((n for n in range(len(OPENING) - 1, 0, -1) if before.endswith(OPENING[:n])), 0)
        before = before[: len(before) - size]
    return before.rstrip()
