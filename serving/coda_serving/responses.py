"""What the API sends back: OpenAI's schema, with the cost in forward passes added to `usage`."""

import dataclasses
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from CoDALanguageModel.answers import FinishReason
from CoDALanguageModel.cost import tokens_per_forward

from .engine import Answer, Delta
from .logprobs import ChatLogprobs, Offsets, Spelling, TextLogprobs


class PromptTokens(BaseModel):
    """What became of the tokens of the prompts."""

    cached_tokens: int
    """Those whose keys and values another request had computed, counted for every answer, `prompt_tokens` at most."""


class Usage(BaseModel):
    """Cost of a request, all its answers together."""

    prompt_tokens: int
    """Tokens of the prompts and suffixes; each counts once, however many answers it gets."""
    completion_tokens: int
    """Tokens of the answers, end tokens not counted."""
    total_tokens: int
    forwards: int
    """Forward passes, each answer's counted. Extension."""
    rows: int
    """Rows in these passes: more where drafts are verified. Extension."""
    tokens_per_forward: float
    """`completion_tokens / forwards`, see `CoDALanguageModel.cost`. Extension."""
    regime: str
    """`exact` (the tokens are those of the stepwise sampler), `cached`, `parallel` or `cached+parallel`. Extension."""
    prompt_tokens_details: PromptTokens

    @classmethod
    def of(cls, prompt_tokens: int, answers: Sequence[Answer], regime: str = "exact") -> "Usage":
        """Sum over `answers`."""
        tokens = sum(answer.num_tokens for answer in answers)
        forwards = sum(answer.forwards for answer in answers)
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=tokens,
            total_tokens=prompt_tokens + tokens,
            forwards=forwards,
            rows=sum(answer.rows for answer in answers),
            tokens_per_forward=round(tokens_per_forward(tokens, forwards) or 0.0, 3),
            regime=regime,
            prompt_tokens_details=PromptTokens(
                cached_tokens=min(prompt_tokens, sum(answer.cached_tokens for answer in answers))
            ),
        )


class Head(BaseModel):
    """What all events of one response have in common."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str) -> "Head":
        """A fresh id, and now."""
        return cls(id=f"{prefix}-{uuid.uuid4().hex}", created=int(time.time()), model=model)


class AssistantMessage(BaseModel):
    """An answer of a conversation."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class CalledFunction(BaseModel):
    """What is to be called."""

    name: str
    arguments: str
    """JSON."""


class ToolCall(BaseModel):
    """A call that the model asks for."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ToolCallDelta(ToolCall):
    """A call in a stream; it comes in one piece."""

    index: int


class CallingMessage(AssistantMessage):
    """An answer that asks for calls."""

    content: str | None
    tool_calls: list[ToolCall]


class ChatChoice(BaseModel):
    """One of the answers of a conversation."""

    index: int
    message: CallingMessage | AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | Literal["tool_calls"]


class ChatCompletion(Head):
    """Response of `/v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """What an event adds to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """The answer that an event is about."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | Literal["tool_calls"] | None = None


class ChatChunk(Head):
    """Event of a streamed conversation."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionChoice(BaseModel):
    """One of the answers to plain prompts; in a stream, what an event adds to it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None


class Filling(BaseModel):
    """What was filled in."""

    gaps: list[str]
    """Text of each gap."""
    lengths: list[int]
    """Masks that each gap had."""
    score: float | None
    """Mean log-probability of the filled tokens when they were committed, in nats; null where no others competed."""


class InfillChoice(CompletionChoice):
    """An answer to `infill`. Its text is all that stands between the first piece and the last."""

    infill: Filling


class Completion(Head):
    """Response of `/v1/completions`, and event of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[InfillChoice | CompletionChoice]
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


@dataclass(frozen=True, kw_only=True)
class Form:
    """How one endpoint words its answers: a whole response, or the events of a stream."""

    id_prefix: str
    response: type[BaseModel]
    event: type[BaseModel]
    choice: Callable[[int, Answer], BaseModel]
    """An answer of a whole response, by its index."""
    part: Callable[[int, Delta, FinishReason | None], BaseModel | None]
    """What an event adds to an answer: text, or its end; None where it adds nothing yet."""
    opening: Callable[[int], BaseModel] | None = None
    """What begins each answer of a stream, where something does."""
    spelling: Spelling | None = None
    """How log-probabilities are told, where they are."""

    def whole(self, head: Head, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        """The whole response."""
        choices = [self.choice(i, answer) for i, answer in enumerate(answers)]
        return self.response(**dict(head), choices=choices, usage=usage)


CHAT = Form(
    id_prefix="chatcmpl",
    response=ChatCompletion,
    event=ChatChunk,
    choice=lambda i, a: ChatChoice(index=i, message=AssistantMessage(content=a.text), finish_reason=a.finish_reason),
    part=lambda i, d, end: ChatChunkChoice(index=i, delta=ChatDelta(content=d.text or None), finish_reason=end),
    opening=lambda i: ChatChunkChoice(index=i, delta=ChatDelta(role="assistant", content="")),
)
TEXT = Form(
    id_prefix="cmpl",
    response=Completion,
    event=Completion,
    choice=lambda i, a: CompletionChoice(index=i, text=a.text, finish_reason=a.finish_reason),
    part=lambda i, d, end: CompletionChoice(index=i, text=d.text, finish_reason=end),
)
INFILL = dataclasses.replace(
    TEXT,
    choice=lambda i, a: InfillChoice(
        index=i,
        text=a.text,
        finish_reason=a.finish_reason,
        infill=Filling(gaps=a.gaps, lengths=a.gap_lengths, score=a.score),
    ),
)


def with_logprobs(form: Form, spelling: Spelling) -> Form:
    """A form of OpenAI's that also tells log-probabilities."""
    offsets: defaultdict[int, Offsets] = defaultdict(lambda: Offsets(spelling.decode))
    """Where the parts of each answer that were sent end."""
    is_chat = form.response is ChatCompletion

    def choice(index: int, answer: Answer) -> BaseModel:
        logprobs = spelling.chat(answer.tokens) if is_chat else spelling.text(answer.tokens)
        return form.choice(index, answer).model_copy(update={"logprobs": logprobs})

    def part(index: int, delta: Delta, end: FinishReason | None) -> BaseModel:
        logprobs = None
        if delta.tokens:
            logprobs = spelling.chat(delta.tokens) if is_chat else spelling.text(delta.tokens, offsets=offsets[index])
        return form.part(index, delta, end).model_copy(update={"logprobs": logprobs})

    return dataclasses.replace(form, choice=choice, part=part, spelling=spelling)
