"""Anthropic's `/v1/messages`: the same conversations, asked and answered in the words of its clients."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator
from starlette.concurrency import run_in_threadpool

from CoDALanguageModel.decoding_settings import LARGEST_INTEGER

from .bodies import body_schema, read_body
from .canvases import Asked, conversation_canvases
from .engine import Answer, Delta
from .errors import MESSAGES, ApiError, MessagesErrorBody, body_at, documented, invalid
from .generation import Generation
from .protocol import NonEmptyText, SamplingRequest, StrictModel, Text
from .replies import check_model, respond
from .responses import Head, Usage
from .service import Service
from .streaming import MakeUsage


class TextBlock(StrictModel):
    """The one kind of content block that there is."""

    type: Literal["text"]
    text: Text
    cache_control: Any = None
    """Accepted, and without effect."""
    citations: Any = None
    """Accepted, and without effect."""

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("type") not in (None, "text"):
            raise invalid(
                f"content blocks of type {data['type']!r} are not supported (supported: text)",
                param="messages.content",
                code="unsupported_field",
            )
        return data


Content = Text | Annotated[list[TextBlock], Field(fail_fast=True)]


class Turn(StrictModel):
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    content: Content


class MessagesRequest(SamplingRequest):
    """Body of `/v1/messages`, and besides its tokens of `/v1/messages/count_tokens`."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "container": (),
        "context_management": (),
        "inference_geo": (),
        "mcp_servers": ([],),
        "output_config": (),
        "output_format": (),
        "speed": ("standard",),
        "thinking": ({"type": "disabled"},),
        "tool_choice": ({"type": "none"}, {"type": "auto"}),
        "tools": ([],),
    }
    closed: ClassVar[frozenset[str]] = frozenset({"n", "stop", "stream_options"})
    ignored: ClassVar[frozenset[str]] = SamplingRequest.ignored | {
        "betas",
        "cache_control",
        "diagnostics",
        "user_profile_id",
        "workspace_id",
    }

    messages: Annotated[list[Turn], Field(fail_fast=True)] = Field(min_length=1)
    """Turns of one role that follow each other are one; a last one of the assistant is gone on with."""
    system: Content | None = None
    """What stands before the conversation."""
    stop_sequences: Annotated[list[NonEmptyText], Field(fail_fast=True)] | None = None
    """The answer ends before the first of these strings that is complete; 16 at most."""
    include_usage: ClassVar[bool] = True

    @model_validator(mode="after")
    def _stop(self) -> "MessagesRequest":
        if len(self.stop_sequences or ()) > 16:
            raise invalid(
                f"stop_sequences takes at most 16 strings, got {len(self.stop_sequences or ())}", "stop_sequences"
            )
        self.stop = self.stop_sequences
        return self

    @property
    def conversation(self) -> list[dict[str, str]]:
        """Roles and texts, as the chat template wants them."""
        turns = [("system", _text(self.system))] if self.system else []
        for turn in self.messages:
            if turns and turns[-1][0] == turn.role:
                turns[-1] = turn.role, f"{turns[-1][1]}\n{_text(turn.content)}"
            else:
                turns.append((turn.role, _text(turn.content)))
        return [{"role": role, "content": text} for role, text in turns]


class AnsweredRequest(MessagesRequest):
    """Body of `/v1/messages`."""

    max_tokens: int = Field(ge=1, le=LARGEST_INTEGER)
    """Most tokens of the answer."""


BODIES = (AnsweredRequest, MessagesRequest)


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


class OutputBlock(BaseModel):
    """Text of an answer."""

    type: Literal["text"] = "text"
    text: str


class MessagesUsage(BaseModel):
    """Cost of a request."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    """Tokens whose keys and values another request had computed."""
    forwards: int = 0
    """Forward passes, each row counted. Extension."""
    tokens_per_forward: float = 0.0
    """`output_tokens / forwards`. Extension."""
    regime: str = "exact"
    """As in OpenAI's usage. Extension."""

    @classmethod
    def of(cls, usage: Usage) -> "MessagesUsage":
        """The same in these words."""
        return cls(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            cache_read_input_tokens=usage.prompt_tokens_details.cached_tokens,
            forwards=usage.forwards,
            tokens_per_forward=usage.tokens_per_forward,
            regime=usage.regime,
        )


StopReason = Literal["end_turn", "stop_sequence", "max_tokens"]


class AnsweredMessage(BaseModel):
    """Response of `/v1/messages`."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[OutputBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage


class TokenCount(BaseModel):
    """Response of `/v1/messages/count_tokens`."""

    input_tokens: int


def stop_reason(answer: Answer) -> StopReason:
    """Why an answer ends."""
    if answer.finish_reason == "length":
        return "max_tokens"
    return "end_turn" if answer.stop is None else "stop_sequence"


class MessagesForm:
    """Anthropic's words."""

    id_prefix = "msg"

    def whole(self, head: Head, answers: Sequence[Answer], usage: Usage) -> AnsweredMessage:
        """The whole response."""
        (answer,) = answers
        return AnsweredMessage(
            id=head.id,
            model=head.model,
            content=[OutputBlock(text=answer.text)],
            stop_reason=stop_reason(answer),
            stop_sequence=answer.stop,
            usage=MessagesUsage.of(usage),
        )


def routes(service: Service) -> APIRouter:
    """`/v1/messages` and the count of its tokens."""
    router = APIRouter()

    @router.post(
        MESSAGES,
        response_model=AnsweredMessage,
        responses=documented(MessagesErrorBody),
        openapi_extra=body_schema(AnsweredRequest),
    )
    async def messages(request: Request) -> Any:
        """Answer a conversation, as Anthropic's API does."""
        body = await read_body(request, AnsweredRequest)
        return await respond(
            service, request, body, messages_canvases, MessagesForm(), events=message_events, error_frame=error_frame
        )

    @router.post(
        MESSAGES + "/count_tokens",
        response_model=TokenCount,
        responses=documented(MessagesErrorBody, streams=False),
        openapi_extra=body_schema(MessagesRequest),
    )
    async def count_tokens(request: Request) -> Any:
        """Tokens of a conversation."""
        body = await read_body(request, MessagesRequest)
        check_model(service.settings, body.model)
        asked = await run_in_threadpool(messages_canvases, service, body.model_copy(update={"max_tokens": 1}))
        return TokenCount(input_tokens=asked.prompt_tokens)

    return router


def messages_canvases(service: Service, body: MessagesRequest) -> Asked:
    """One canvas for the answer, or for the rest of it."""
    messages = body.conversation
    goes_on = messages[-1]["role"] == "assistant"
    return conversation_canvases(service, body, messages, body.max_tokens, continue_final_message=goes_on)


async def message_events(
    generation: Generation, head: Head, form: MessagesForm, n: int, make_usage: MakeUsage
) -> AsyncIterator[str]:
    """Frames of a streamed answer: the message, its one block, and what is added to it."""
    usage = MessagesUsage.of(make_usage([]))
    message = AnsweredMessage(
        id=head.id, model=head.model, content=[], stop_reason=None, stop_sequence=None, usage=usage
    )
    yield named_event("message_start", message=message.model_dump())
    yield named_event("content_block_start", index=0, content_block=OutputBlock(text="").model_dump())
    yield named_event("ping")
    try:
        async for _, event in generation.events():
            if isinstance(event, Delta):
                yield named_event("content_block_delta", index=0, delta={"type": "text_delta", "text": event.text})
            else:
                answer = event
    except ApiError as error:  # the status has been sent already
        yield error_frame(error)
        return
    yield named_event("content_block_stop", index=0)
    delta = {"stop_reason": stop_reason(answer), "stop_sequence": answer.stop}
    yield named_event("message_delta", delta=delta, usage=MessagesUsage.of(make_usage([answer])).model_dump())
    yield named_event("message_stop")


def named_event(name: str, **fields: Any) -> str:
    """A frame with its name, which its data repeats."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields}, ensure_ascii=False)}\n\n"


def error_frame(error: ApiError) -> str:
    """The frame of an error."""
    return f"event: error\ndata: {json.dumps(body_at(MESSAGES, error))}\n\n"
