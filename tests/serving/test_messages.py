"""Anthropic's endpoint, asked in process and by its official client."""

import json
import re

import anthropic
import pytest

URL = "/v1/messages"
ASK = {"model": "tiny", "max_tokens": 20, "messages": [{"role": "user", "content": "hi"}]}


TOOL = {"name": "now", "input_schema": {"type": "object", "properties": {}}}
DEEP = json.loads('{"a":' * 150 + "1" + "}" * 150)
GIVEN = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "7"}]}


def use(value):
    return {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "now", "input": {"a": value}}]}


USED = use(1)


def ask(serve, sampler=None, url=URL, **body):
    async def test(client):
        content = json.dumps(ASK | body).replace("Infinity", "1e999")
        return await client.post(url, content=content, headers={"Content-Type": "application/json"})

    return serve(test, sampler)


def test_an_answer_has_anthropics_shape(serve):
    answer = ask(serve).json()
    assert answer.pop("id").startswith("msg-")
    usage = answer.pop("usage")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }
    assert (usage["input_tokens"], usage["output_tokens"]) == (len("[user]hi"), 5)
    assert anthropic.types.Message.model_validate(answer | {"id": "msg-1", "usage": usage})


def test_the_conversation_is_that_of_a_chat(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler()
    blocks = [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "b"},
    ]
    turns = [{"role": "user", "content": blocks}, {"role": "user", "content": "c"}]
    ask(serve, sampler, system="brief", messages=turns, temperature=0.5, top_k=3, stop_sequences=["x"])
    (request,) = sampler.batches[0]
    assert bytes(request.prompt_ids).decode() == "[system]brief[user]a\nb\nc"
    assert (request.options.temperature, request.options.top_k, request.stop) == (0.5, 3, ("x",))


@pytest.mark.parametrize(
    ("script", "body", "reason", "sequence"),
    [
        (b"hello", {}, "end_turn", None),
        (b"x" * 50, {}, "max_tokens", None),
        (b"one\n\ntwo", {"stop_sequences": ["zz", "\n\n"]}, "stop_sequence", "\n\n"),
    ],
)
def test_the_reason_to_stop_is_named(serve, serving_fakes, script, body, reason, sequence):
    answer = ask(serve, serving_fakes.FakeSampler(script=lambda r: script), **body).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)


def test_a_stream_has_anthropics_events_and_adds_up(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler(script=lambda r: b"one\n\ntwo")
    response = ask(serve, sampler, stream=True, stop_sequences=["\n\n"], seed=3)
    frames = [frame.split("\n") for frame in response.text.strip().split("\n\n")]
    names = [frame[0].removeprefix("event: ") for frame in frames]
    datas = [json.loads(frame[1].removeprefix("data: ")) for frame in frames]
    assert names == [data["type"] for data in datas]
    deltas = [data["delta"]["text"] for data in datas if data["type"] == "content_block_delta"]
    around = [name for name in names if name != "content_block_delta"]
    assert around == [
        "message_start",
        "content_block_start",
        "ping",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert "".join(deltas) == "one"
    assert datas[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "\n\n"}
    assert (
        datas[-2]["usage"]["output_tokens"]
        == ask(serve, sampler, stop_sequences=["\n\n"]).json()["usage"]["output_tokens"]
    )


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "invalid_request_error", "tools of type 'bash_"),
        ({"tools": [TOOL | {"input_examples": [{}]}]}, 400, "invalid_request_error", "input_examples is not supported"),
        ({"tools": [TOOL | {"input_schema": DEEP}]}, 400, "invalid_request_error", "nested deeper than 100"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice needs tools"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}},
            400,
            "invalid_request_error",
            "none of the tools",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "tool"}},
            400,
            "invalid_request_error",
            "needs a name with type tool",
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "required"}}, 400, "invalid_request_error", "tool_choice.type"),
        ({"messages": [USED]}, 400, "invalid_request_error", "whose result must follow"),
        ({"messages": [USED | {"role": "user"}]}, 400, "invalid_request_error", "'tool_use' are not supported in user"),
        (
            {"messages": [GIVEN | {"role": "assistant"}]},
            400,
            "invalid_request_error",
            "'tool_result' are not supported",
        ),
        ({"messages": [use(1e999), GIVEN]}, 400, "invalid_request_error", "too large for JSON"),
        ({"messages": [use("\ud800"), GIVEN]}, 400, "invalid_request_error", "lone surrogate"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "invalid_request_error", "thinking"),
        ({"n": 2}, 400, "invalid_request_error", "unknown field 'n'"),
        ({"stop": ["x"]}, 400, "invalid_request_error", "unknown field 'stop'"),
        ({"max_tokens": 5000}, 400, "invalid_request_error", "maximum context length"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "type 'image' are not supported",
        ),
        ({"model": "other"}, 404, "not_found_error", "is not served here"),
    ],
)
def test_mistakes_have_anthropics_shape(serve, body, status, kind, words):
    response = ask(serve, **body)
    error = response.json()
    assert (response.status_code, error["type"], error["error"]["type"]) == (status, "error", kind)
    assert words in error["error"]["message"]


CALLS = "".join(f'<tool_call>{{"name": "now", "arguments": {{"a": {i}}}}}</tool_call>' for i in range(2))


@pytest.mark.parametrize(
    ("script", "text", "num_calls"),
    [(f"So:\n{CALLS}", "So:", 2), (CALLS, None, 2), ("a < b <tool", "a < b <tool", 0), ("", "", 0)],
)
def test_calls_in_free_text_are_blocks_behind_it_whether_streamed_or_whole(
    serve, serving_fakes, monkeypatch, script, text, num_calls
):
    encode_chat = serving_fakes.ByteEncoder.encode_chat

    def encode(self, messages, *, tools, **options):
        assert tools == [{"type": "function", "function": {"name": "now", "parameters": TOOL["input_schema"]}}]
        return encode_chat(self, messages, **options)

    monkeypatch.setattr(serving_fakes.ByteEncoder, "encode_chat", encode)
    sampler = serving_fakes.FakeSampler(script=lambda r: script.encode())
    body = {"tools": [TOOL], "max_tokens": 200}
    whole = ask(serve, sampler, **body).json()
    texts, uses = ([b for b in whole["content"] if b["type"] == kind] for kind in ("text", "tool_use"))
    assert [block["text"] for block in texts] == ([] if text is None else [text])
    assert [(block["name"], block["input"]) for block in uses] == [("now", {"a": i}) for i in range(num_calls)]
    assert whole["stop_reason"] == ("tool_use" if num_calls else "end_turn")
    assert anthropic.types.Message.model_validate(whole)

    frames = ask(serve, sampler, stream=True, **body).text.strip().split("\n\n")
    datas = [json.loads(frame.split("data: ")[1]) for frame in frames]
    blocks = {data["index"]: data["content_block"] for data in datas if data["type"] == "content_block_start"}
    for data in datas:
        if data["type"] == "content_block_delta" and data["delta"]["type"] == "text_delta":
            blocks[data["index"]]["text"] += data["delta"]["text"]
        elif data["type"] == "content_block_delta":
            blocks[data["index"]]["input"] = json.loads(data["delta"]["partial_json"])
    assert list(blocks) == list(range(len(whole["content"])))
    assert [b | {"id": 0} for b in blocks.values()] == [b | {"id": 0} for b in whole["content"]]
    assert datas[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    one = ask(serve, sampler, tool_choice={"type": "auto", "disable_parallel_tool_use": True}, **body).json()
    assert len([b for b in one["content"] if b["type"] == "tool_use"]) == min(1, num_calls)


def test_a_result_that_is_an_error_says_so_and_blocks_keep_their_order(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler()
    result = {"type": "tool_result", "tool_use_id": "1"}
    failed = result | {"is_error": True, "content": [{"type": "text", "text": "no"}]}
    turns = [{"role": "user", "content": [result, failed, {"type": "text", "text": "on"}]}]
    ask(serve, sampler, messages=[{**USED, "content": USED["content"] * 2}, *turns])
    ((request,),) = sampler.batches
    call = '<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>'
    assert bytes(request.prompt_ids).decode() == f"[assistant]{call}\n{call}[tool][tool]Error: no[user]on"


def in_chat(calls, results):
    """A conversation of OpenAI's: calls by their ids, and results by the ids that they name, with texts among them."""
    function = {"name": "now", "arguments": "{}"}
    called = [{"type": "function", "id": i, "function": {**function, "arguments": f'"{i}"'}} for i in calls]
    turns = [{"role": "assistant", "tool_calls": called}] if calls else []
    for name in results:
        is_text = name is not None and name.startswith(" ")
        turns.append({"role": "user" if is_text else "tool", "content": f"of {name}"})
        turns[-1] |= {} if is_text else {"tool_call_id": name}
    return [{"role": "user", "content": "hi"}, *turns]


def in_messages(calls, results):
    """The same in Anthropic's words."""
    called = [{"type": "tool_use", "id": i, "name": "now", "input": {"id": i}} for i in calls]
    blocks = [
        {"type": "text", "text": f"of {name}"}
        if name.startswith(" ")
        else {"type": "tool_result", "tool_use_id": name, "content": f"of {name}"}
        for name in results
    ]
    turns = [{"role": "assistant", "content": called}] if calls else []
    return [{"role": "user", "content": "hi"}, *turns, {"role": "user", "content": blocks}]


@pytest.mark.parametrize(("url", "turns"), [("/v1/chat/completions", in_chat), (URL, in_messages)])
def test_a_result_reaches_the_call_that_it_names_and_none_is_taken_for_another_ones(serve, serving_fakes, url, turns):
    def said(calls, results):
        sampler = serving_fakes.FakeSampler()
        response = ask(serve, sampler, url, messages=turns(calls, results))
        assert response.status_code == 200, response.text
        return re.findall(r"\[(?:tool|user)\]of ([^\[]*)", bytes(sampler.batches[0][0].prompt_ids).decode())

    assert said("abc", ["c", "a", "b"]) == said("abc", ["a", "b", "c"]) == ["a", "b", "c"]
    assert said("abc", ["b", " and", "a"]) == ["a", " and", "b"]  # the last call may have no result
    assert said("aab", ["b", "a", "a"]) == ["a", "a", "b"]  # of one id in the order in which they stand
    name = "tool_call_id" if turns is in_chat else "tool_use_id"
    for calls, results, words in (
        ("ab", ["a", "x"], f"{name} 'x' names no call of the turn before (its calls: 'a', 'b')"),
        ("", ["x"], f"{name} 'x' names no call of the turn before (it has none)"),
        ("ab", ["x" * 500], f"{name} '{'x' * 79} names no call"),
        ("ab", ["a", "a"], "a call has one result, but 'a' has 2"),
        ("ab", ["b"], "the call 'a' has no result, and a later one of its turn has"),
    ):
        response = ask(serve, url=url, messages=turns(calls, results))
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]


def test_results_without_ids_stay_as_they_stand_and_all_or_none_has_one(serve, serving_fakes):
    sampler, chat = serving_fakes.FakeSampler(), "/v1/chat/completions"
    assert ask(serve, sampler, chat, messages=in_chat("ab", [None, None])).status_code == 200
    assert bytes(sampler.batches[0][0].prompt_ids).decode().endswith("[tool]of None[tool]of None")
    response = ask(serve, url=chat, messages=in_chat("ab", ["a", None]))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages.tool_call_id")
    assert "need a tool_call_id, or none of them" in response.json()["error"]["message"]


def test_what_the_gate_refuses_has_anthropics_shape_too(serve):
    async def test(client):
        return await client.post(URL, json=ASK)

    response = serve(test, api_key="secret")
    assert response.status_code == 401
    assert response.json()["error"]["type"] == "authentication_error"


def test_a_failing_model_ends_a_stream_with_an_error_event(serve, serving_fakes):
    response = ask(serve, serving_fakes.FakeSampler(error=RuntimeError("secret")), stream=True)
    last = response.text.strip().split("\n\n")[-1].split("\n")
    assert last[0] == "event: error"
    assert json.loads(last[1].removeprefix("data: "))["error"]["type"] == "api_error"


def test_tokens_are_counted_without_an_answer(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler()
    body = {name: value for name, value in ASK.items() if name != "max_tokens"}

    async def test(client):
        return await client.post(URL + "/count_tokens", json=body)

    assert serve(test, sampler).json() == {"input_tokens": len("[user]hi")}
    assert not sampler.batches


def test_the_official_client_is_answered_as_a_chat_is(live_server):
    import openai

    messages = [{"role": "user", "content": "def add(a, b):"}]
    chat = openai.OpenAI(base_url=live_server.url + "/v1", api_key="none", max_retries=0).chat.completions.create(
        model="tiny-coda", messages=messages, max_tokens=12, seed=3
    )
    client = anthropic.Anthropic(base_url=live_server.url, api_key="none", max_retries=0, timeout=60)
    asked = dict(model="tiny-coda", messages=messages, max_tokens=12, extra_body={"seed": 3})
    plain = client.messages.create(**asked)
    assert plain.content[0].text == chat.choices[0].message.content
    assert plain.usage.input_tokens == chat.usage.prompt_tokens
    with client.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert final.content[0].text == plain.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (plain.stop_reason, plain.usage.output_tokens)
    prefilled = client.messages.create(
        model="tiny-coda", messages=[*messages, {"role": "assistant", "content": "    return"}], max_tokens=4
    )
    assert prefilled.stop_reason in ("end_turn", "max_tokens")
    counted = client.messages.count_tokens(model="tiny-coda", messages=messages)
    assert counted.input_tokens == plain.usage.input_tokens
    with pytest.raises(anthropic.NotFoundError, match="is not served here"):
        client.messages.create(model="claude", messages=messages, max_tokens=4)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model="tiny-coda", messages=messages, max_tokens=0)
