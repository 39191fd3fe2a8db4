"""Tools: functions that the model may call, in Qwen's (Hermes') format, and its calls in OpenAI's shape.

A call that is asked for is an answer by the schema of its function. Not here: which texts a schema takes
(`CoDALanguageModel.json_schema`).
"""

import dataclasses
import json
import re
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from CoDALanguageModel.errors import half_surrogate

from .engine import Answer, Delta
from .errors import invalid
from .protocol import ChatRequest, Shape, Tool
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


def shape_of(body: ChatRequest) -> Shape | None:
    """What a conversation's answer must match: `response_format`, `guided_regex`, or a call that is asked for.

    Raises:
        ApiError: two of them, or a tool that there is not.
    """
    shape, tools = body.shape, callable_tools(body)
    choice = body.tool_choice
    if choice not in (None, "none", "auto") and not body.tools:
        raise invalid("tool_choice needs tools", param="tool_choice")
    if shape is not None and tools:
        raise invalid(f"{shape.param} cannot be used with tools: say tool_choice none", param=shape.param)
    if choice in (None, "none", "auto"):
        return shape
    if not isinstance(choice, str):
        name = choice.function.name
        tools = [tool for tool in tools if tool.function.name == name]
        if not tools:
            raise invalid(f"tool_choice names {name!r}, which is none of the tools", param="tool_choice")
    calls = [_call_schema(tool, f"#/anyOf/{i}") for i, tool in enumerate(tools)]
    return Shape("tools", {"json_schema": {"anyOf": calls}}, BEGINNING)


def callable_tools(body: ChatRequest) -> list[Tool]:
    """The tools that the model is told of."""
    return [] if body.tool_choice == "none" else list(body.tools or ())


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
    shape, tools = shape_of(body), callable_tools(body)
    if tools:
        return _calling(form, {tool.function.name for tool in tools}, is_call=shape is not None)
    return form if shape is None else completed(form)


def completed(form: Form) -> Form:
    """The same for answers that match their shape: one that fills its canvas is whole."""
    return dataclasses.replace(
        form,
        choice=lambda i, answer: form.choice(i, dataclasses.replace(answer, finish_reason="stop")),
        part=lambda i, delta, end: form.part(i, delta, end and "stop"),
    )


def _calling(form: Form, names: set[str], *, is_call: bool) -> Form:
    """Words for answers in which there may be calls; `is_call` for those that are one, without its beginning."""
    texts: dict[int, str] = {}
    shown: dict[int, int] = {}

    def read(text: str) -> tuple[str, list[ToolCall]]:
        return read_calls(BEGINNING + text if is_call else text, names)

    def choice(index: int, answer: Answer) -> BaseModel:
        text, calls = read(answer.text)
        if not calls:
            return form.choice(index, answer)
        message = CallingMessage(content=text or None, tool_calls=calls)
        return ChatChoice(index=index, message=message, finish_reason="tool_calls")

    def part(index: int, delta: Delta, end: Literal["stop", "length"] | None) -> BaseModel | None:
        texts[index] = whole = texts.get(index, "") + delta.text
        if end is None:
            seen = "" if is_call else _before_call(whole)
            calls = []
        else:
            seen, calls = read(whole)
        new = seen[shown.get(index, 0) :]
        shown[index] = max(len(seen), shown.get(index, 0))
        if end is None:
            return form.part(index, Delta(new), None) if new or delta.canvas is not None else None
        if not calls:
            return form.part(index, Delta(new), end)
        deltas = [ToolCallDelta(index=i, **dict(call)) for i, call in enumerate(calls)]
        added = ChatDelta(content=new or None, tool_calls=deltas)
        return ChatChunkChoice(index=index, delta=added, finish_reason="tool_calls")

    return dataclasses.replace(form, choice=choice, part=part)


def read_calls(text: str, names: Sequence[str] | set[str]) -> tuple[str, list[ToolCall]]:
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
