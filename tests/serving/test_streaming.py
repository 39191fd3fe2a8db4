"""Server-sent events: OpenAI's shape, and the text of the plain answer."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

CODE = "\n\ndef f(x):\n\treturn  x   # two  spaces\n\n\n"
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
URL = "/v1/chat/completions"


def post(url, **body):
    async def test(client):
        return await client.post(url, json=body)

    return test


def events_of(text):
    """Parsed events of a stream, which must end with [DONE]."""
    frames = text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def test_a_stream_has_openais_events(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler(script=lambda r: CODE.encode())
    body = CHAT | {"stream": True, "max_tokens": 60, "stream_options": {"include_usage": True}, "seed": 5}
    response = serve(post(URL, **body), sampler)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, last = events_of(response.text)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == CODE
    assert [e["choices"][0]["finish_reason"] for e in events if e["choices"][0]["finish_reason"]] == ["stop"]
    assert events[-1]["choices"][0]["delta"] == {}
    assert len({e["id"] for e in [*events, last]}) == 1
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(CODE)
    assert all("usage" not in e for e in events)


@settings(max_examples=25, deadline=None)
@given(
    text=st.text("ab \n\u00e9\u4e2d\U0001f600", max_size=10),
    stop=st.lists(st.sampled_from(["\n", "ab", "\u4e2d ", "b\n"]), max_size=2),
    seed=st.integers(0, 99),
    n=st.integers(1, 3),
    chat=st.booleans(),
)
def test_streamed_text_adds_up_to_the_plain_answer(serve, serving_fakes, text, stop, seed, n, chat):
    sampler = serving_fakes.FakeSampler(script=lambda r: text.encode() + bytes([128 + r.seed % 5, 65]))
    url, prompt = (URL, CHAT) if chat else ("/v1/completions", {"prompt": ["p", "q"]})
    body = prompt | {"stop": stop, "seed": seed, "n": n, "max_tokens": 50}

    async def test(client):
        plain = await client.post(url, json=body)
        return plain.json(), (await client.post(url, json=body | {"stream": True})).text

    plain, stream = serve(test, sampler)
    texts, reasons = {}, {}
    for event in events_of(stream):
        (choice,) = event["choices"]
        piece = choice["delta"].get("content", "") if chat else choice["text"]
        texts[choice["index"]] = texts.get(choice["index"], "") + piece
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    expected = {c["index"]: c["message"]["content"] if chat else c["text"] for c in plain["choices"]}
    assert texts == expected
    assert reasons == {c["index"]: c["finish_reason"] for c in plain["choices"]}
