"""What a server's answer holds, of which nothing is taken on trust: the official client checks none of it."""

from typing import Any, Literal, NamedTuple

import openai
from pydantic import BaseModel, ConfigDict, Field, ValidationError

MOST_CELLS = 1 << 18
"""Cells of a canvas that are drawn: more than any context has tokens."""


class AnswerFault(openai.OpenAIError):
    """What came is no answer of this API."""

    def __init__(self, what: str) -> None:
        super().__init__(f"what the server sent is no answer of this API: {what}")


class _Told(BaseModel):
    """What is read of something; more may stand there."""

    model_config = ConfigDict(strict=True, frozen=True)


class Usage(_Told):
    """The cost of an answer."""

    prompt_tokens: int
    completion_tokens: int
    forwards: int | None = None


class Cell(NamedTuple):
    """One token's place, as `CoDALanguageModel.canvas_view` has it."""

    position: int
    text: str | None
    state: Literal["masked", "provisional", "committed", "given"]
    confidence: float | None


class Canvas(_Told):
    """What has changed of a canvas."""

    step: int
    length: int | None = Field(None, ge=0, le=MOST_CELLS)
    cells: list[Cell] = Field(strict=False)


class Part(NamedTuple):
    """A part of an answer."""

    text: str
    usage: Usage | None = None
    canvas: Canvas | None = None
    """What has changed of the canvas, where that is asked for."""


class _Message(_Told):
    content: str | None = None


class _Choice(_Told):
    message: _Message | None = None
    delta: _Message | None = None
    text: str | None = None
    canvas: Canvas | None = None


class _Answer(_Told):
    choices: list[_Choice]
    usage: Usage | None = None


def read_part(answer: Any) -> Part:
    """A whole answer, or an event of a stream, which may have only the usage.

    Raises:
        AnswerFault: it is neither.
    """
    if not isinstance(answer, openai.BaseModel):
        raise AnswerFault(f"{str(answer)[:100]!r}")
    try:
        read = _Answer.model_validate(answer.to_dict(mode="python", warnings=False))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise AnswerFault(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error
    if not read.choices:
        return Part("", read.usage)
    choice = read.choices[0]
    message = choice.delta or choice.message or _Message(content=choice.text)
    return Part(message.content or "", read.usage, choice.canvas)
