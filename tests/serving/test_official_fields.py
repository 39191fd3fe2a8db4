"""Every field of the official clients' own types is honoured, refused by name, or has no effect by name."""

import anthropic.types.message_create_params as anthropic_messages
import pytest
from anthropic import types
from openai.types import chat, completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam

from coda_serving.errors import ApiError
from coda_serving.messages import AnsweredRequest, AnthropicTool, TextBlock, ToolChoice, ToolResultBlock, ToolUseBlock
from coda_serving.protocol import ChatRequest, CompletionRequest, Message, StreamOptions

MESSAGES = [{"role": "user", "content": "hi"}]
BODIES = {
    "chat": (chat_create_params, "CompletionCreateParams", ChatRequest, {"messages": MESSAGES}),
    "completions": (completion_create_params, "CompletionCreateParams", CompletionRequest, {"prompt": "hi"}),
    "messages": (
        anthropic_messages,
        "MessageCreateParams",
        AnsweredRequest,
        {"messages": MESSAGES, "max_tokens": 4},
    ),
}
SOMETHING = {"asks for": "something"}


def official(module, name) -> set[str]:
    kinds = ("Base", "Streaming", "NonStreaming")
    return {field for kind in kinds for field in getattr(module, name + kind).__annotations__}


CASES = [(body, field) for body, (module, name, _, _) in BODIES.items() for field in sorted(official(module, name))]


@pytest.mark.parametrize(("body", "field"), CASES, ids=[f"{body}-{field}" for body, field in CASES])
def test_every_official_field_has_one_of_three_fates(body, field):
    _, _, request, least = BODIES[body]
    honoured = set(request.model_fields) - request.closed
    fates = [field in honoured, field in request.neutral, field in request.ignored]
    assert sum(fates) == 1, f"{field} is new: honour it, refuse it by name, or list it as without effect"
    if field in request.neutral:
        with pytest.raises(ApiError, match=f"^{field} is not supported by this server") as caught:
            request(**least, **{field: SOMETHING})
        assert (caught.value.status, caught.value.param) == (400, field)
        request(**least, **{field: None})
    if field in request.ignored:
        assert request(**least, **{field: SOMETHING}) == request(**least)


def test_the_official_lists_are_read():
    assert len(CASES) > 60
    assert {("chat", "top_logprobs"), ("completions", "echo"), ("messages", "stop_sequences")} < set(CASES)


def test_every_option_of_a_stream_is_known():
    extensions = {"include_canvas"}
    assert set(ChatCompletionStreamOptionsParam.__annotations__) == set(StreamOptions.model_fields) - extensions


@pytest.mark.parametrize(
    "kind",
    ["System", "Developer", "User", "Assistant"],
)
def test_every_field_of_a_message_is_honoured_or_refused_by_name(kind):
    official_fields = getattr(chat, f"ChatCompletion{kind}MessageParam").__annotations__
    for field in official_fields.keys() - Message.model_fields.keys() - {"name"}:
        with pytest.raises(ApiError, match=f"field {field} is not supported"):
            Message(role=kind.lower(), content="a", **{field: SOMETHING})


@pytest.mark.parametrize(
    ("official_type", "model"),
    [
        (types.ToolParam, AnthropicTool),
        (types.TextBlockParam, TextBlock),
        (types.ToolUseBlockParam, ToolUseBlock),
        (types.ToolResultBlockParam, ToolResultBlock),
        (types.ToolChoiceToolParam, ToolChoice),
        (types.ToolChoiceAnyParam, ToolChoice),
        (types.ToolChoiceNoneParam, ToolChoice),
    ],
)
def test_every_field_of_anthropics_tools_and_blocks_is_known(official_type, model):
    neutral = getattr(model, "neutral", {})
    assert official_type.__annotations__.keys() <= model.model_fields.keys() | neutral.keys()
    for field in neutral:
        with pytest.raises(ApiError, match=f"{field} is not supported"):
            model(name="f", input_schema={"type": "object"}, **{field: SOMETHING})


def test_refusals_that_are_not_plain_say_why():
    with pytest.raises(ApiError, match="best_of is not supported by this server: .* ask for n answers and choose"):
        CompletionRequest(prompt="a", best_of=2)
