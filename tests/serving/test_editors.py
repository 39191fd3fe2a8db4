"""Requests as editors' plug-ins send them, each after the plug-in's own source, and what the plug-in reads of it."""

import json

import pytest

from coda_serving.editors import until_dedent

BEFORE, AFTER = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n"

# ggml-org/llama.vim, autoload/llama.vim: llama#fim and s:ring_update
LLAMA_VIM = {
    "input_prefix": "def add(a, b):\n",
    "input_suffix": AFTER,
    "input_extra": [{"text": "import os\n", "time": [1732, 45], "filename": "os_first.py"}],
    "prompt": "    return ",
    "n_predict": 32,
    "stop": [],
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.99,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1000,
    "response_fields": [
        "content",
        "timings/prompt_n",
        "timings/prompt_ms",
        "timings/prompt_per_token_ms",
        "timings/prompt_per_second",
        "timings/predicted_n",
        "timings/predicted_ms",
        "timings/predicted_per_token_ms",
        "timings/predicted_per_second",
        "truncated",
        "tokens_cached",
    ],
}
LLAMA_VIM_RING = {
    "input_prefix": "",
    "input_suffix": "",
    "input_extra": [{"text": "import os\n", "time": [1732, 45], "filename": "os_first.py"}],
    "prompt": "",
    "n_predict": 0,
    "temperature": 0.0,
    "stream": False,
    "samplers": [],
    "cache_prompt": True,
    "t_max_prompt_ms": 1,
    "t_max_predict_ms": 1,
    "response_fields": [""],
}
# ggml-org/llama.vscode, src/llama-server.ts: createRequestPayload
LLAMA_VSCODE = {
    "input_prefix": "def add(a, b):\n",
    "input_suffix": AFTER,
    "input_extra": [],
    "prompt": "    return ",
    "n_predict": 32,
    "top_k": 40,
    "top_p": 0.99,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 2500,
}
# continuedev/continue, packages/openai-adapters/src/apis/OpenAI.ts: fimStream
CONTINUE = {
    "model": "tiny",
    "prompt": BEFORE,
    "suffix": AFTER,
    "max_tokens": 32,
    "temperature": 0.01,
    "top_p": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "stop": ["[PREFIX]", "[SUFFIX]", "/src/", "#- coding: utf-8", "```"],
    "stream": True,
}
# milanglacier/minuet-ai.nvim, lua/minuet/backends/codestral.lua
MINUET_CODESTRAL = {
    "model": "tiny",
    "prompt": BEFORE,
    "suffix": AFTER,
    "stream": False,
    "max_tokens": 32,
    "stop": ["\n\n"],
}
# milanglacier/minuet-ai.nvim, recipes.md: llama.cpp behind openai_fim_compatible
MINUET_LLAMA_CPP = {
    "model": "tiny",
    "stream": True,
    "prompt": f"<|fim_prefix|>{BEFORE}<|fim_suffix|>{AFTER}<|fim_middle|>",
    "max_tokens": 32,
    "top_p": 0.9,
}
# milanglacier/minuet-ai.nvim, lua/minuet/backends/common.lua: complete_openai_fim_base, with `optional` for this server
MINUET = {
    "model": "tiny",
    "stream": True,
    "prompt": BEFORE,
    "suffix": AFTER,
    "max_tokens": 32,
    "infill": {"lengths": "auto"},
}
# mistralai/client-python: fim.complete of docs.mistral.ai
MISTRAL = {"model": "tiny", "prompt": BEFORE, "suffix": AFTER, "temperature": 0, "top_p": 1, "random_seed": 7}


def ask(serve, sampler, url, body, **settings):
    async def test(client):
        return await client.post(url, json=body)

    return serve(test, sampler, **settings)


@pytest.fixture
def sampler(serving_fakes):
    """Prefers gaps of 8 masks, and writes something else for every length."""

    def script(request):
        return f"a + b  # {request.max_tokens}".encode()[: request.max_tokens - 1]

    return serving_fakes.FakeSampler(script=script, score=lambda request: -abs(request.max_tokens - 8))


def events(response):
    """The data of a stream's events."""
    frames = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(frame) for frame in frames if frame != "[DONE]"]


def lengths(sampler):
    return sorted(request.max_tokens for batch in sampler.batches for request in batch)


def test_llama_vim_gets_the_fields_it_asks_for(serve, sampler):
    response = ask(serve, sampler, "/infill", LLAMA_VIM)
    assert response.status_code == 200, response.text
    assert list(response.json()) == LLAMA_VIM["response_fields"]
    assert response.json()["content"] == "a + b  "
    assert (response.json()["timings/predicted_n"], response.json()["truncated"]) == (7, False)
    (first, *_) = sampler.batches[0]
    assert bytes(first.prompt_ids).decode() == "--- os_first.py ---\nimport os\n" + BEFORE
    assert bytes(first.suffix_ids).decode() == AFTER
    assert (first.options.top_k, first.options.top_p) == (40, 0.99)
    assert lengths(sampler) == [1, 2, 4, 8, 16, 32]


def test_responses_are_counted_by_their_routes(serve, sampler):
    async def test(client):
        for url, body in (("/infill", LLAMA_VIM), ("/v1/fim/completions", MISTRAL), ("/v1/messages", {})):
            await client.post(url, json=body)
        return (await client.get("/metrics")).text

    text = serve(test, sampler)
    for path, status in (("/infill", 200), ("/v1/fim/completions", 200), ("/v1/messages", 400)):
        assert f'coda_responses_total{{path="{path}",status="{status}"}} 1.0' in text


def test_llama_vim_warms_caches_up_without_an_answer(serve, sampler):
    response = ask(serve, sampler, "/infill", LLAMA_VIM_RING)
    assert (response.status_code, response.json()) == (200, {})
    assert not sampler.batches


def test_llama_vscode_reads_content_and_timings(serve, sampler):
    answer = ask(serve, sampler, "/infill", LLAMA_VSCODE).json()
    assert answer["content"] == "a + b  "
    assert answer["truncated"] is False
    timings = {"prompt_n", "prompt_ms", "prompt_per_second", "predicted_n", "predicted_ms", "predicted_per_second"}
    assert timings <= answer["timings"].keys()
    assert answer["timings"]["prompt_n"] == len(BEFORE + AFTER)
    assert (answer["stop_type"], answer["infill"]["lengths"], answer["infill"]["score"]) == ("eos", [8], 0.0)


def test_continue_reads_the_deltas_of_a_chat(serve, sampler):
    response = ask(serve, sampler, "/v1/fim/completions", CONTINUE)
    chunks = events(response)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "a + b  "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_minuet_reads_the_message_of_codestral(serve, sampler):
    answer = ask(serve, sampler, "/v1/fim/completions", MINUET_CODESTRAL).json()
    assert answer["choices"][0]["message"]["content"] == answer["choices"][0]["text"] == "a + b  "


def test_mistral_names_the_seed_otherwise(serve, sampler):
    answer = ask(serve, sampler, "/v1/fim/completions", MISTRAL).json()
    assert answer["usage"]["completion_tokens"] == 7
    assert {request.seed for batch in sampler.batches for request in batch} == {7}


@pytest.mark.parametrize("body", [MINUET_LLAMA_CPP, MINUET])
def test_minuet_reads_the_text_of_completions(serve, sampler, body):
    chunks = events(ask(serve, sampler, "/v1/completions", body))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "a + b  "
    (first, *_) = sampler.batches[0]
    assert (bytes(first.prompt_ids).decode(), bytes(first.suffix_ids).decode()) == (BEFORE, AFTER)
    assert lengths(sampler) == [1, 2, 4, 8, 16, 32]


def test_control_tokens_beside_a_suffix_or_in_a_message_are_text(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler()
    prompt = MINUET_LLAMA_CPP["prompt"]
    ask(serve, sampler, "/v1/completions", {"prompt": prompt, "suffix": "x", "max_tokens": 3})
    ask(serve, sampler, "/v1/completions", {"prompt": prompt, "suffix": "", "max_tokens": 3})
    ask(serve, sampler, "/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}], "max_tokens": 3})
    seen = [bytes(batch[0].prompt_ids).decode() for batch in sampler.batches]
    assert seen == [prompt, prompt, "[user]" + prompt]


def test_an_ambiguous_prompt_of_control_tokens_is_refused(serve):
    response = ask(serve, None, "/v1/completions", {"prompt": MINUET_LLAMA_CPP["prompt"] + "<|fim_middle|>"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/infill", {"input_prefix": BEFORE, "n_predict": 9}),
        ("/v1/fim/completions", {"prompt": BEFORE, "max_tokens": 9}),
        ("/v1/completions", {"prompt": f"<|fim_prefix|>{BEFORE}<|fim_suffix|><|fim_middle|>", "max_tokens": 9}),
    ],
)
def test_with_nothing_behind_the_gap_the_text_goes_on(serve, serving_fakes, url, body):
    sampler = serving_fakes.FakeSampler()
    assert ask(serve, sampler, url, body).status_code == 200
    ((request,),) = sampler.batches
    assert (request.suffix_ids, request.max_tokens) == (None, 9)


def test_what_does_not_fit_is_left_out_and_said(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler(context_length=100)
    files = [{"filename": name, "text": name * 10} for name in "xyz"]
    body = {"input_extra": files, "input_prefix": "p" * 30, "input_suffix": "s" * 10, "n_predict": 20}
    answer = ask(serve, sampler, "/infill", body).json()
    assert answer["truncated"] is True
    assert bytes(sampler.batches[0][0].prompt_ids).decode() == "--- z ---\n" + "z" * 10 + "\n" + "p" * 30
    body = {"input_prefix": "p" * 30 + "q" * 50, "input_suffix": "s" * 30, "n_predict": 20}
    assert ask(serve, sampler, "/infill", body).json()["truncated"] is True
    request = sampler.batches[1][0]
    assert bytes(request.prompt_ids) == b"p" * 10 + b"q" * 50
    assert bytes(request.suffix_ids) == b"s" * 20
    body = {"input_extra": files, "input_prefix": "p" * 900, "input_suffix": "s" * 500 + "z" * 500, "n_predict": 20}
    assert ask(serve, sampler, "/infill", body).json()["truncated"] is True
    request = sampler.batches[2][0]
    assert (set(request.prompt_ids), set(request.suffix_ids)) == ({ord("p")}, {ord("s")})
    assert request.num_positions <= 100


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input_prefixx": "a"}, "did you mean 'input_prefix'"),
        ({"input_prefix": "a", "n": 2}, "unknown field 'n'"),
        ({"input_prefix": "a", "lora": [{"id": 0, "scale": 0.5}]}, "lora is not supported"),
        ({"input_prefix": "a", "min_p": 0.1}, "min_p is not supported"),
        ({"input_prefix": "a", "n_predict": 5000}, "less than the context of 2000"),
        ({"input_prefix": 5}, "input_prefix"),
    ],
)
def test_mistakes_are_named(serve, body, words):
    response = ask(serve, None, "/infill", body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_a_key_is_needed_and_may_come_as_x_api_key(serve):
    async def test(client):
        urls = ["/infill", "/v1/fim/completions", "/v1/messages"]
        without = [(await client.post(url, json={})).status_code for url in urls]
        given = {"x-api-key": "secret"}
        return without, [(await client.post(url, json={"bad": 1}, headers=given)).status_code for url in urls]

    assert serve(test, api_key="secret") == ([401] * 3, [400] * 3)


def test_infill_streams_what_it_would_send_whole(serve, serving_fakes):
    code = "x = 1\n        y = 2\n\n    z = 3\nw = 4\n"
    body = {"input_prefix": "", "prompt": "        ", "n_predict": 60, "n_indent": 4, "seed": -1}

    def fake():
        return serving_fakes.FakeSampler(script=lambda r: code.encode())

    whole = ask(serve, fake(), "/infill", body).json()
    assert whole["content"] == "x = 1\n        y = 2\n\n    z = 3\n"
    chunks = events(ask(serve, fake(), "/infill", body | {"stream": True}))
    assert "".join(chunk["content"] for chunk in chunks) == whole["content"]
    assert [chunk["stop"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["stop_type"] == whole["stop_type"] == "limit"


def test_text_ends_before_a_line_that_is_not_indented_enough():
    text = "a\n    b\n\n  c\n"
    assert until_dedent(text, 4) == "a\n    b\n\n"
    assert until_dedent(text, 2) == text
    assert until_dedent("a\n ", 4, is_whole=False) == "a\n"
    assert until_dedent("a\n ", 4) == "a\n "


def test_the_best_of_equals_is_the_shortest_and_all_are_paid_for(serve, serving_fakes):
    sampler = serving_fakes.FakeSampler(script=lambda r: b"x" * r.max_tokens)
    answer = ask(serve, sampler, "/v1/completions", MINUET | {"stream": False}).json()
    assert answer["choices"][0]["text"] == "x"
    assert answer["choices"][0]["infill"] == {"gaps": ["x"], "lengths": [1], "score": -1.0}
    assert answer["usage"]["forwards"] == 1 + 2 + 4 + 8 + 16 + 32
    assert answer["usage"]["completion_tokens"] == 1
