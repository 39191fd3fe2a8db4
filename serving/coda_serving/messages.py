"""Anthropic's `/v1/messages`: the same conversations, asked and answered in the words of its clients."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from starlette.concurrency import run_in_threadpool

from CoDALanguageModel.decoding_settings import LARGEST_INTEGER

from .bodies import body_schema, read_body
from .canvases import Asked, conversation_ids, lay_out
from .engine import Answer, Delta
from .errors import MESSAGES, ApiError, MessagesErrorBody, body_at, documented, invalid
from .generation import Generation
from .protocol import (
    EarlierCall,
    EarlierFunction,
    Function,
    FunctionName,
    NonEmptyText,
    SamplingRequest,
    StrictModel,
    Text,
    Tool,
    Tooling,
    check_unicode,
)
from .replies import check_model, respond
from .responses import Head, ToolCall, Usage
from .results import Part, in_order_of_calls
from .service import Service
from .streaming import MakeUsage
from .tools import CallReader, Calls, calls_of, shape_of

BLOCKS = {
    "system": ("text",),
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use"),
    "tool_result": ("text",),
}
"""Kinds of content blocks by where they may stand."""


def _check_kinds(blocks: Any, place: str) -> Any:
    """Refuse blocks of a kind that may not stand at a place, before they are judged as one of another kind."""
    for block in blocks if isinstance(blocks, list) else ():
        kind = block.get("type") if isinstance(block, dict) else None
        if isinstance(kind, str) and kind not in BLOCKS[place]:
            raise invalid(
                f"content blocks of type {kind!r} are not supported in {place} (supported: {', '.join(BLOCKS[place])})",
                param="messages.content",
                code="unsupported_field",
            )
    return blocks


class Block(StrictModel):
    """A content block."""

    cache_control: Any = None
    """Accepted, and without effect."""


class TextBlock(Block):
    """Text."""

    type: Literal["text"]
    text: Text
    citations: Any = None
    """Accepted, and without effect."""

    def as_part(self, role: str) -> Part:
        """As the chat template wants it, in a turn of a role."""
        return Part(role, self.text)


def _texts_in(place: str) -> Any:
    """The type of a text, or of blocks of it, at one of `BLOCKS`."""
    check = BeforeValidator(lambda blocks: _check_kinds(blocks, place))
    return Text | Annotated[list[TextBlock], Field(fail_fast=True), check]


class ToolUseBlock(Block):
    """A call of an earlier turn."""

    type: Literal["tool_use"]
    id: str
    name: FunctionName
    input: dict[str, Any]
    """The arguments."""
    caller: Any = None
    """Accepted, and without effect."""
    toolset_name: Any = None
    """Accepted, and without effect."""
    _call: EarlierCall

    @model_validator(mode="after")
    def _read_input(self) -> "ToolUseBlock":
        try:
            arguments = json.dumps(self.input, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise invalid("messages: the input of a call holds a number that is too large for JSON") from error
        self._call = EarlierCall(function=EarlierFunction(name=self.name, arguments=check_unicode(arguments)))
        return self

    def as_part(self, role: str) -> Part:
        """As the chat template wants it, in a turn of a role."""
        return Part(role, self._call.as_text(), calls=(self.id,))


class ToolResultBlock(Block):
    """What a call gave back."""

    type: Literal["tool_result"]
    tool_use_id: str
    """Of a call of the turn before. The model sees the results in the order of the calls."""
    content: _texts_in("tool_result") | None = None  # type: ignore[valid-type]
    is_error: bool | None = None
    """True puts `Error: ` before the content."""
    toolset_name: Any = None
    """Accepted, and without effect."""

    def as_part(self, role: str) -> Part:
        """As the chat template wants it: results have a role of their own."""
        text = ("Error: " if self.is_error else "") + _text(self.content or "")
        return Part("tool", text, result_of=self.tool_use_id)


class Turn(StrictModel):
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    content: (
        Text
        | Annotated[
            list[Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]],
            Field(fail_fast=True),
        ]
    )

    @model_validator(mode="before")
    @classmethod
    def _check_kinds_of_role(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("role") in ("user", "assistant"):
            _check_kinds(data.get("content"), data["role"])
        return data

    def parts(self) -> list[Part]:
        """Its blocks: the result of a call has a role of its own."""
        if isinstance(self.content, str) or not self.content:
            return [Part(self.role, self.content or "")]
        return [block.as_part(self.role) for block in self.content]


class AnthropicTool(StrictModel):
    """A function that the model may call."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "allowed_callers": (["direct"],),
        "defer_loading": (False,),
        "input_examples": ([],),
    }
    """Fields that are not supported, with the values that ask for nothing and are therefore accepted."""

    type: Literal["custom"] | None = None
    name: FunctionName
    description: Text | None = None
    input_schema: dict[str, Any]
    """JSON schema of an object."""
    strict: Any = None
    """Without effect: a call that is asked for is by the schema, and any other is not held to it."""
    cache_control: Any = None
    """Accepted, and without effect."""
    eager_input_streaming: Any = None
    """Accepted, and without effect: a call comes in one piece."""

    _function: Function

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("type") not in (None, "custom"):
            raise invalid(
                f"tools of type {data['type']!r} are not supported (supported: custom)", "tools", "unsupported_field"
            )
        for name, harmless in cls.neutral.items():
            if data.get(name) is not None and data[name] not in harmless:
                raise invalid(f"tools: {name} is not supported by this server", "tools", "unsupported_field")
        return {name: value for name, value in data.items() if name not in cls.neutral}

    @model_validator(mode="after")
    def _read_schema(self) -> "AnthropicTool":
        self._function = Function(name=self.name, description=self.description, parameters=self.input_schema)
        return self

    def as_tool(self) -> Tool:
        """The same in OpenAI's words."""
        return Tool(type="function", function=self._function)


class ToolChoice(StrictModel):
    """Whether the model must call."""

    type: Literal["auto", "any", "tool", "none"]
    """`any`: the answer is a call of one of the tools; `tool`: of the one of this name."""
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None
    """True keeps the first call of an answer that holds several."""

    @model_validator(mode="after")
    def _check_name(self) -> "ToolChoice":
        if (self.name is None) == (self.type == "tool"):
            raise invalid("tool_choice needs a name with type tool, and only then", "tool_choice")
        return self


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
    system: _texts_in("system") | None = None  # type: ignore[valid-type]
    """What stands before the conversation."""
    tools: Annotated[list[AnthropicTool], Field(fail_fast=True, max_length=128)] | None = None
    """Functions that the model may call."""
    tool_choice: ToolChoice | None = None
    """`auto`, the default: the answer may hold calls."""
    shape: ClassVar[None] = None
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

    @model_validator(mode="after")
    def _results_follow(self) -> "MessagesRequest":
        last = self.messages[-1].content
        if not isinstance(last, str) and last and last[-1].type == "tool_use":
            raise invalid("messages: the last turn ends with a call, whose result must follow", "messages")
        return self

    @property
    def tooling(self) -> Tooling:
        """What is said of tools, in OpenAI's words."""
        tools = [tool.as_tool() for tool in self.tools or ()]
        choice = self.tool_choice
        if choice is None:
            return Tooling(tools)
        required = "required" if choice.type in ("any", "tool") else choice.type
        return Tooling(tools, required, choice.name, not choice.disable_parallel_tool_use)

    @property
    def conversation(self) -> list[dict[str, str]]:
        """Roles and texts, as the chat template wants them."""
        turns = [("system", _text(self.system))] if self.system else []
        parts = [part for turn in self.messages for part in turn.parts()]
        for role, text, *_ in in_order_of_calls(parts, "tool_use_id"):
            if turns and turns[-1][0] == role != "tool":
                turns[-1] = role, f"{turns[-1][1]}\n{text}"
            else:
                turns.append((role, text))
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


class OutputCall(BaseModel):
    """A call that the model asks for."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


class MessagesUsage(BaseModel):
    """Cost of a request."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    """Tokens whose keys and values another request had computed."""
    forwards: int = 0
    """As in OpenAI's usage. Extension."""
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


StopReason = Literal["end_turn", "stop_sequence", "max_tokens", "tool_use"]


class AnsweredMessage(BaseModel):
    """Response of `/v1/messages`."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[OutputBlock | OutputCall]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage


class TokenCount(BaseModel):
    """Response of `/v1/messages/count_tokens`."""

    input_tokens: int


def _end(answer: Answer, calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
    """Why an answer ends."""
    if calls:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if answer.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    return {"stop_reason": "end_turn" if answer.stop is None else "stop_sequence", "stop_sequence": answer.stop}


class MessagesForm:
    """Anthropic's words.

    Args:
        calls: how an answer is read that may hold calls.
    """

    id_prefix = "msg"

    def __init__(self, calls: Calls | None) -> None:
        self.calls = calls

    def whole(self, head: Head, answers: Sequence[Answer], usage: Usage) -> AnsweredMessage:
        """The whole response."""
        (answer,) = answers
        text, calls = (answer.text, []) if self.calls is None else self.calls.read(answer.text)
        blocks = [OutputBlock(text=text)] if text or not calls else []
        inputs = [json.loads(call.function.arguments) for call in calls]
        uses = [OutputCall(id=c.id, name=c.function.name, input=i) for c, i in zip(calls, inputs, strict=True)]
        return AnsweredMessage(
            id=head.id,
            model=head.model,
            content=[*blocks, *uses],
            usage=MessagesUsage.of(usage),
            **_end(answer, calls),
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
        form = MessagesForm(calls_of(body))
        return await respond(
            service, request, body, messages_canvases, form, events=message_events, error_frame=error_frame
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
        return TokenCount(input_tokens=len(await run_in_threadpool(_prompt_ids, service, body, None)))

    return router


def messages_canvases(service: Service, body: AnsweredRequest) -> Asked:
    """One canvas for the answer, or for the rest of it."""
    ids = _prompt_ids(service, body, body.max_tokens)
    return lay_out(service, body, [[ids]], body.max_tokens, "messages", shape=shape_of(body))


def _prompt_ids(service: Service, body: MessagesRequest, max_tokens: int | None) -> list[int]:
    messages = body.conversation
    goes_on = messages[-1]["role"] == "assistant"
    return conversation_ids(service, body, messages, max_tokens, shape_of(body), continue_final_message=goes_on)


async def message_events(
    generation: Generation, head: Head, form: MessagesForm, n: int, make_usage: MakeUsage
) -> AsyncIterator[str]:
    """Frames of a streamed answer: the message, its blocks, and what is added to them.

    Where there are no tools its one block is begun at once, and else with its first text; a call comes in one piece.
    """
    usage = MessagesUsage.of(make_usage([]))
    message = AnsweredMessage(
        id=head.id, model=head.model, content=[], stop_reason=None, stop_sequence=None, usage=usage
    )
    reader = None if form.calls is None else CallReader(form.calls)
    calls: list[ToolCall] = []
    text_begins = named_event("content_block_start", index=0, content_block=OutputBlock(text="").model_dump())
    has_text = reader is None
    yield named_event("message_start", message=message.model_dump())
    if has_text:
        yield text_begins
    yield named_event("ping")
    try:
        async for _, event in generation.events():
            if isinstance(event, Delta):
                text = event.text if reader is None else reader.more(event.text)
            else:
                answer = event
                text, calls = ("", []) if reader is None else reader.end()
            if not has_text and (text or (isinstance(event, Answer) and not calls)):
                has_text = True
                yield text_begins
            if text:
                yield named_event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
    except ApiError as error:  # the status has been sent already
        yield error_frame(error)
        return
    if has_text:
        yield named_event("content_block_stop", index=0)
    for index, call in enumerate(calls, int(has_text)):
        use = OutputCall(id=call.id, name=call.function.name, input={})
        arguments = {"type": "input_json_delta", "partial_json": call.function.arguments}
        yield named_event("content_block_start", index=index, content_block=use.model_dump())
        yield named_event("content_block_delta", index=index, delta=arguments)
        yield named_event("content_block_stop", index=index)
    usage = MessagesUsage.of(make_usage([answer]))
    yield named_event("message_delta", delta=_end(answer, calls), usage=usage.model_dump())
    yield named_event("message_stop")


def named_event(name: str, **fields: Any) -> str:
    """A frame with its name, which its data repeats."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields}, ensure_ascii=False)}\n\n"


def error_frame(error: ApiError) -> str:
    """The frame of an error."""
    return f"event: error\ndata: {json.dumps(body_at(MESSAGES, error))}\n\n"
