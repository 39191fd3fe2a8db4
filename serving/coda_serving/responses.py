"""What the API sends back: OpenAI's schema, with the cost in forward passes added to `usage`."""

import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from CoDALanguageModel.answers import FinishReason

from .engine import Answer


class Usage(BaseModel):
    """Cost of a request, all its answers together."""

    prompt_tokens: int
    """Tokens of the prompts and suffixes; each counts once, however many answers it gets."""
    completion_tokens: int
    """Tokens of the answers, end tokens not counted."""
    total_tokens: int
    forwards: int
    """Forward passes, each row counted. Extension."""
    tokens_per_forward: float
    """`completion_tokens / forwards`. Extension."""

    @classmethod
    def of(cls, prompt_tokens: int, answers: Sequence[Answer]) -> "Usage":
        """Sum over `answers`."""
        tokens = sum(answer.num_tokens for answer in answers)
        forwards = sum(answer.forwards for answer in answers)
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=tokens,
            total_tokens=prompt_tokens + tokens,
            forwards=forwards,
            tokens_per_forward=round(tokens / forwards, 3) if forwards else 0.0,
        )


class AssistantMessage(BaseModel):
    """An answer of a conversation."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One of the answers of a conversation."""

    index: int
    message: AssistantMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Response of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """What an event adds to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """The answer that an event is about."""

    index: int
    delta: ChatDelta
    logprobs: None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """Event of a streamed conversation."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionChoice(BaseModel):
    """One of the answers to plain prompts; in a stream, what an event adds to it."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """Response of `/v1/completions`, and event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "coda"
    max_model_len: int
    """Context in tokens. Extension, as in vLLM."""
    attention: str
    """`full` or `block_causal`, which fills no gap whose right side is in a later block. Extension."""
    block_size: int | None
    """Tokens of a block with block-causal attention. Extension."""
    defaults: dict[str, Any]
    """What holds for a request that does not say otherwise, by the names of its fields. Extension."""


class ModelList(BaseModel):
    """Response of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Head(BaseModel):
    """What all events of one response have in common."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str) -> "Head":
        """A fresh id, and now."""
        return cls(id=f"{prefix}-{uuid.uuid4().hex}", created=int(time.time()), model=model)


def chat_completion(head: Head, answers: Sequence[Answer], usage: Usage) -> ChatCompletion:
    """The whole response to a conversation."""
    choices = [
        ChatChoice(index=i, message=AssistantMessage(content=answer.text), finish_reason=answer.finish_reason)
        for i, answer in enumerate(answers)
    ]
    return ChatCompletion(**head.model_dump(), choices=choices, usage=usage)


def completion(head: Head, answers: Sequence[Answer], usage: Usage) -> Completion:
    """The whole response to plain prompts."""
    choices = [
        CompletionChoice(index=i, text=answer.text, finish_reason=answer.finish_reason)
        for i, answer in enumerate(answers)
    ]
    return Completion(**head.model_dump(), choices=choices, usage=usage)


def chat_chunk(
    head: Head, index: int, text: str | None, finish_reason: FinishReason | None = None, *, is_first: bool = False
) -> ChatChunk:
    """An event that adds `text` to answer `index`, begins it, or ends it."""
    delta = ChatDelta(role="assistant" if is_first else None, content=text)
    return ChatChunk(
        **head.model_dump(), choices=[ChatChunkChoice(index=index, delta=delta, finish_reason=finish_reason)]
    )


def completion_chunk(head: Head, index: int, text: str, finish_reason: FinishReason | None = None) -> Completion:
    """An event that adds `text` to answer `index`, or ends it."""
    choice = CompletionChoice(index=index, text=text, finish_reason=finish_reason)
    return Completion(**head.model_dump(), choices=[choice])
