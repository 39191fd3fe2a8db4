"""Every field is honoured, refused by name, or ignored by name."""

import logging

import pytest
from pydantic import ValidationError

from coda_serving.errors import ApiError
from coda_serving.protocol import ChatRequest, CompletionRequest
from coda_serving.tools import shape_of

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields):
    return ChatRequest(**({"messages": MESSAGES} | fields))


def test_null_is_the_servers_default():
    nulls = dict.fromkeys([*ChatRequest.model_fields, *ChatRequest.neutral, "user"])
    assert chat(**(nulls | {"messages": MESSAGES})).model_dump(exclude_none=True) == chat().model_dump(
        exclude_none=True
    )


def test_an_unknown_field_is_refused_with_the_nearest_one():
    with pytest.raises(ApiError, match="unknown field 'temprature'; did you mean 'temperature'") as caught:
        chat(temprature=1.0)
    assert (caught.value.status, caught.value.param) == (400, "temprature")


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{}]},
        {"modalities": ["audio"]},
        {"reasoning_effort": "low"},
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields):
    (name,) = fields
    with pytest.raises(ApiError, match=f"{name} is not supported") as caught:
        chat(**fields)
    assert caught.value.param == name


@pytest.mark.parametrize("fields", [{"best_of": 2}])
def test_what_completions_do_not_support_is_refused_by_name(fields):
    (name,) = fields
    with pytest.raises(ApiError, match=f"{name} is not supported"):
        CompletionRequest(prompt="x", **fields)


def test_values_that_ask_for_nothing_are_accepted():
    chat(
        logprobs=False,
        tools=[],
        logit_bias={},
        presence_penalty=0,
        frequency_penalty=0.0,
        response_format={"type": "text"},
        tool_choice="none",
    )
    assert shape_of(chat(tools=[], tool_choice="auto")) is None
    CompletionRequest(prompt="x", echo=False, best_of=1)


def test_ignored_fields_are_named_in_the_log(caplog):
    with caplog.at_level(logging.INFO):
        chat(user="someone", metadata={"a": "b"})
    assert "ignored request field: user" in caplog.text
    assert "ignored request field: metadata" in caplog.text
    assert "someone" not in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("max_tokens", 5.0),
        ("steps", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 2.5),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("n", 0),
        ("n", 129),
        ("seed", -1),
        ("seed", 2**63),
        ("alg", "greedy"),
        ("alg_temp", -1),
        ("block_length", 0),
        ("threshold", 1.5),
        ("threshold", "off"),
        ("kv_cache", "both"),
        ("logit_bias", [5]),
        ("suppress_tokens", [0.5]),
        ("stop", ""),
        ("stream", 1),
        ("messages", []),
    ],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValidationError) as caught:
        chat(**{name: value})
    assert name in str(caught.value)


def test_none_turns_off_what_can_be_off():
    given = {"threshold": "none", "block_length": "none", "top_k": -1, "kv_cache": "none", "speculate": None}
    assert chat(**given).decoding == {"threshold": None, "block_length": None, "top_k": None, "kv_cache": "none"}
    with pytest.raises(ValidationError, match="steps"):
        chat(steps="none")


def test_both_names_of_the_length_must_agree():
    chat(max_tokens=5, max_completion_tokens=5)
    with pytest.raises(ApiError, match="max_tokens=5 and max_completion_tokens=6"):
        chat(max_tokens=5, max_completion_tokens=6)


def test_stream_options_need_a_stream():
    with pytest.raises(ApiError, match="stream_options needs stream=true"):
        chat(stream_options={"include_usage": True})
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage


def test_stop_takes_one_or_several_strings():
    assert chat(stop="x").stop_strings == ("x",)
    assert chat(stop=["x", "y"]).stop_strings == ("x", "y")
    with pytest.raises(ApiError, match="at most 16"):
        chat(stop=["x"] * 17)


def test_text_parts_are_joined_and_other_parts_refused():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": " b"}]
    assert chat(messages=[{"role": "developer", "content": parts}]).messages[0].as_part()[:2] == ("system", "a \n b")
    with pytest.raises(ValidationError, match="type"):
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def test_a_message_as_the_client_dumps_it_is_accepted_with_its_calls():
    dumped = {"role": "assistant", "content": "a", "refusal": None, "audio": None, "tool_calls": None}
    assert chat(messages=[dumped]).messages[0].content == "a"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    (message,) = chat(messages=[dumped | {"content": None, "tool_calls": [call]}]).messages
    part = message.as_part()
    assert (part.text, part.calls) == ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', ("1",))
    with pytest.raises(ApiError, match="field audio is not supported"):
        chat(messages=[dumped | {"audio": {"id": "1"}}])


def test_text_must_be_unicode():
    with pytest.raises(ValidationError, match="lone surrogate at character 1"):
        chat(messages=[{"role": "user", "content": "a\ud800"}])


def test_prompts_may_be_texts_or_ids():
    assert CompletionRequest(prompt="a").prompts == ["a"]
    assert CompletionRequest(prompt=["a", "b"]).prompts == ["a", "b"]
    assert CompletionRequest(prompt=[1, 2]).prompts == [[1, 2]]
    assert CompletionRequest(prompt=[[1], [2, 3]]).prompts == [[1], [2, 3]]
    with pytest.raises(ApiError, match="at least one text"):
        CompletionRequest(prompt=[])
