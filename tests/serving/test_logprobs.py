"""Log-probabilities: those of the model room, in OpenAI's shapes, of answers and of echoed prompts."""

import json

import openai
import pytest
import torch

from coda_serving.engine import Judged
from coda_serving.logprobs import LEAST, Offsets, Spelling
from CoDALanguageModel import CoDALanguageModel, Evidence

MESSAGES = [{"role": "user", "content": "def add(a, b):"}]
PROMPT = "def add(a, b):\n    return a"
DECODING = {"steps": 6, "alg": "maskgit_plus", "alg_temp": 0.2, "block_length": 8, "top_p": 0.8}


@pytest.fixture(scope="module")
def model(model_folder):
    return CoDALanguageModel.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def client(live_server):
    return openai.OpenAI(base_url=live_server.url + "/v1", api_key="none", max_retries=0, timeout=60)


def chain(model, ids):
    """(T - 1, V) log-probabilities of what follows 1, 2, ... of the tokens while all behind are masked."""
    mask = model.config.mask_token_id
    rows = torch.tensor([ids[:i] + [mask] * (len(ids) - i) for i in range(1, len(ids))])
    with torch.inference_mode():
        logits = model(rows, attention_mask=torch.ones_like(rows)).logits
    scored = logits[torch.arange(len(rows)), torch.arange(len(rows))]  # a token is scored by the one before it
    scored[:, [mask, model.config.pad_token_id]] = -torch.inf
    scored[:, model.config.num_token_ids :] = -torch.inf
    return scored.log_softmax(dim=-1)


def test_logprobs_of_a_chat_are_those_at_commit_and_stream_alike(client, model, chatml_tokenizer):
    ask = dict(model="tiny-coda", messages=MESSAGES, max_tokens=16, temperature=0.9, seed=4, extra_body=DECODING)
    plain = client.chat.completions.create(**ask)
    told = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
    assert told.choices[0].message.content == plain.choices[0].message.content
    text = chatml_tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = chatml_tokenizer(text, return_tensors="pt")["input_ids"]
    out = model.diffusion_generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=16,
        temperature=0.9,
        seed=4,
        output_scores=True,
        return_dict_in_generate=True,
        **DECODING,
    )
    content = told.choices[0].logprobs.content
    behind = slice(ids.shape[1], ids.shape[1] + len(content))
    assert len(content) == told.usage.completion_tokens
    assert [token.logprob for token in content] == pytest.approx(out.scores[0, behind].tolist(), abs=1e-5)
    assert [token.step for token in content] == out.commit_steps[0, behind].tolist()
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob >= token.logprob - 1e-6
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    events = list(client.chat.completions.create(**ask, logprobs=True, top_logprobs=3, stream=True))
    streamed = [t for e in events if e.choices[0].logprobs for t in e.choices[0].logprobs.content]
    assert streamed == content


@pytest.mark.parametrize("regime", [{"speculate": 2}, {"alg": "p2"}, {"threshold": 0.5}, {"remask": "conf"}])
def test_every_regime_tells_them_of_every_token(client, regime):
    answer = client.completions.create(
        model="tiny-coda", prompt=PROMPT, max_tokens=12, logprobs=2, seed=1, extra_body=DECODING | regime
    )
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == answer.usage.completion_tokens
    assert all(value <= 1e-6 for value in logprobs.token_logprobs)
    assert all(step >= 0 for step in logprobs.steps)


def test_the_kept_candidate_tells_its_own_and_without_any_best_there_is_the_token(client):
    answer = client.completions.create(
        model="tiny-coda", prompt="a = ", suffix="\nb", max_tokens=8, logprobs=0, extra_body={"infill": {}}
    )
    choice = answer.choices[0]
    (length,), score = choice.infill["lengths"], choice.infill["score"]
    values = choice.logprobs.token_logprobs
    assert [len(top) for top in choice.logprobs.top_logprobs] == [1] * len(values)
    if len(values) == length:  # no end token cut the gap
        assert sum(values) / length == pytest.approx(score, abs=1e-5)


def test_an_echoed_prompt_is_scored_from_left_to_right(client, model, chatml_tokenizer):
    ids = chatml_tokenizer.encode(PROMPT, add_special_tokens=False)
    told = client.completions.create(model="tiny-coda", prompt=PROMPT, max_tokens=3, echo=True, logprobs=2)
    plain = client.completions.create(model="tiny-coda", prompt=PROMPT, max_tokens=3)
    logprobs = told.choices[0].logprobs
    expected = chain(model, ids)
    assert told.choices[0].text == PROMPT + plain.choices[0].text
    assert told.usage.completion_tokens == plain.usage.completion_tokens
    assert "".join(logprobs.tokens).startswith(PROMPT)
    assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
    values = expected[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(values.tolist(), abs=1e-4)
    best = [max(top.values()) for top in logprobs.top_logprobs[1 : len(ids)]]
    assert best == pytest.approx(expected.amax(dim=1).tolist(), abs=1e-4)
    assert len(logprobs.tokens) == len(ids) + plain.usage.completion_tokens
    for token, offset in zip(logprobs.tokens[: len(ids)], logprobs.text_offset, strict=False):
        assert PROMPT[offset:].startswith(token)
    assert logprobs.text_offset[len(ids)] == len(PROMPT)
    assert logprobs.steps[: len(ids)] == [None, *range(len(ids) - 1)]


def test_an_echo_alone_needs_no_answer_and_streams_without_logprobs(client):
    alone = client.completions.create(model="tiny-coda", prompt=[PROMPT, "x"], max_tokens=0, echo=True, logprobs=0)
    assert [choice.text for choice in alone.choices] == [PROMPT, "x"]
    assert alone.usage.completion_tokens == 0
    both = client.completions.create(model="tiny-coda", prompt=[PROMPT, "x"], max_tokens=4, echo=True, logprobs=0, n=2)
    sizes = [len(choice.logprobs.tokens) for choice in alone.choices]
    firsts = [c.logprobs.token_logprobs[: sizes[c.index // 2]] for c in both.choices]
    for i, values in enumerate(firsts):
        expected = alone.choices[i // 2].logprobs.token_logprobs
        assert values[0] is expected[0] is None
        assert values[1:] == pytest.approx(expected[1:], abs=1e-4)
    pieces = list(client.completions.create(model="tiny-coda", prompt=PROMPT, max_tokens=4, echo=True, stream=True))
    whole = client.completions.create(model="tiny-coda", prompt=PROMPT, max_tokens=4, echo=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[0].choices[0].text == PROMPT


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 2, "echo": True, "n": 2, "temperature": 0.9, "seed": 3},
        {"logprobs": 0, "echo": True, "max_tokens": 0},
        {"echo": True, "max_tokens": 0},
        {"logprobs": 1, "temperature": 1.5, "seed": 5},
    ],
    ids=str,
)
def test_a_stream_adds_up_to_the_plain_answer_with_its_logprobs(client, fields):
    """Three prompts of different length, one of which has nothing to score."""
    ask = (
        dict(model="tiny-coda", prompt=[PROMPT, "x", "a = \u00e9"], extra_body={"steps": 24})
        | {"max_tokens": 24}
        | fields
    )
    plain = client.completions.create(**ask)
    chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    streamed = {c.index: {"text": "", "logprobs": None, "finish_reason": None} for c in plain.choices}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        told = streamed[choice.index]
        assert told["finish_reason"] is None
        told["text"] += choice.text
        told["finish_reason"] = choice.finish_reason
        if choice.logprobs is not None:
            added = choice.logprobs.model_dump()
            told["logprobs"] = {k: (told["logprobs"] or {}).get(k, []) + v for k, v in added.items()}
    for choice in plain.choices:
        logprobs = None if choice.logprobs is None else choice.logprobs.model_dump()
        assert streamed[choice.index] == {
            "text": choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }
    assert chunks[-1].usage.forwards == plain.usage.forwards
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens


@pytest.mark.parametrize("prompt", [[10**6], [5, 10**6], [5, -1], [5, "mask"]])
@pytest.mark.parametrize("asked", [{"logprobs": 1}, {}, {"max_tokens": 3}], ids=str)
def test_an_echo_of_ids_that_are_none_is_refused(client, model, prompt, asked):
    ids = [model.config.mask_token_id if token == "mask" else token for token in prompt]
    with pytest.raises(openai.BadRequestError, match="prompt ids must be in"):
        client.completions.create(**{"model": "tiny-coda", "prompt": ids, "max_tokens": 0, "echo": True} | asked)


def test_lm_evals_loglikelihood_runs_against_the_server(live_server, model_folder, model, chatml_tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    lm = LocalCompletionsAPI(
        base_url=live_server.url + "/v1/completions",
        model="tiny-coda",
        tokenizer=str(model_folder),
        tokenizer_backend="huggingface",
        batch_size=2,
        max_length=512,
    )
    pairs = [("def add(a, b):", "\n    return a"), ("def f(x):", "\n    return x"), ("a", "b")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (before, after), (value, is_greedy) in zip(pairs, lm.loglikelihood(asked), strict=True):
        start = chatml_tokenizer.encode(before, add_special_tokens=False)
        ids = chatml_tokenizer.encode(before + after, add_special_tokens=False)
        expected = chain(model, ids)[len(start) - 1 :]
        wanted = torch.tensor(ids[len(start) :])
        assert value == pytest.approx(float(expected.gather(1, wanted[:, None]).sum()), abs=1e-3)
        assert is_greedy == bool((expected.argmax(dim=1) == wanted).all())


def test_lm_evals_generation_runs_against_both_endpoints(live_server, model_folder, client):
    from lm_eval.api.instance import Instance
    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    tokenizer = dict(tokenizer=str(model_folder), tokenizer_backend="huggingface", max_length=512)
    url = live_server.url + "/v1"
    plain = LocalCompletionsAPI(base_url=url + "/completions", model="tiny-coda", batch_size=2, **tokenizer)
    talk = LocalChatCompletion(base_url=url + "/chat/completions", model="tiny-coda", **tokenizer)
    options = {"until": ["\n\n"], "max_gen_toks": 12, "temperature": 0.0, "do_sample": False}
    prompts = [PROMPT, "def f(x):", "a"]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    fields = dict(model="tiny-coda", max_tokens=12, temperature=0, seed=1234, stop=["\n\n"])

    def answers(lm, contexts):
        return lm.generate_until(
            [Instance("generate_until", {}, (c, dict(options)), i) for i, c in enumerate(contexts)]
        )

    expected = [client.completions.create(prompt=prompt, **fields).choices[0].text for prompt in prompts]
    assert answers(plain, prompts) == expected
    expected = [client.chat.completions.create(messages=chat, **fields).choices[0].message.content for chat in chats]
    assert answers(talk, [JsonChatStr(json.dumps(chat)) for chat in chats]) == expected


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", "at least 1, or 0 with echo=true"),
        ({"echo": True, "suffix": "x"}, "echo", "not text around a gap"),
        ({"echo": True, "prompt": "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"}, "echo", "not text around a gap"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"prompt": None, "infill": {"pieces": ["a", "b", "c"]}, "logprobs": 1}, "logprobs", "not of several"),
        ({"best_of": 3}, "best_of", "not supported"),
    ],
)
def test_mistakes_are_named(serve, body, param, words):
    async def test(client):
        return await client.post("/v1/completions", json={"prompt": "a"} | body)

    response = serve(test)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"top_logprobs": 2}, "needs logprobs=true"),
        ({"logprobs": True, "tools": [{"type": "function", "function": {"name": "f"}}]}, "of text and not of calls"),
    ],
)
def test_a_chat_tells_them_of_text_that_asks_for_them(serve, body, words):
    async def test(client):
        return await client.post("/v1/chat/completions", json={"messages": MESSAGES} | body)

    assert words in serve(test).json()["error"]["message"]


def test_an_answer_that_matches_and_candidates_with_a_bias_tell_them_too(client):
    shaped = client.completions.create(
        model="tiny-coda", prompt="a", max_tokens=12, logprobs=1, echo=True, extra_body={"guided_regex": "[ab]{2,4}"}
    )
    logprobs = shaped.choices[0].logprobs
    assert len(logprobs.tokens) == 1 + shaped.usage.completion_tokens
    assert shaped.choices[0].finish_reason == "stop"
    biased = client.completions.create(
        model="tiny-coda",
        prompt="a = ",
        suffix="\nb",
        max_tokens=6,
        logprobs=1,
        logit_bias={"5": 1},
        extra_body={"infill": {}},
    )
    assert len(biased.choices[0].logprobs.tokens) == biased.usage.completion_tokens


def test_tokens_that_are_no_text_are_named_by_their_ids(serving_fakes):
    spelling = Spelling(serving_fakes.bytes_to_text, 2)
    euro = "\u20ac".encode()
    known = Evidence(-1.0, 0, ((euro[0], -1.0), (65, -2.0), (66, -torch.inf)))
    tokens = [Judged(token, known) for token in (*b"a", *euro, *b"b", serving_fakes.EOS)]
    text = spelling.text(tokens)
    assert text.tokens == ["a", *(f"token_id:{i}" for i in euro), "b", f"token_id:{serving_fakes.EOS}"]
    assert text.text_offset == [0, 1, 1, 1, 2, 3]
    for cut in range(len(tokens)):  # in portions, also within a character
        offsets = Offsets(serving_fakes.bytes_to_text)
        parts = [spelling.text(part, offsets=offsets).text_offset for part in (tokens[:cut], tokens[cut:])]
        assert sum(parts, []) == text.text_offset
    assert text.top_logprobs[0] == {"a": -1.0, f"token_id:{euro[0]}": -1.0, "A": -2.0}
    chat = spelling.chat([Judged(euro[0], Evidence(-torch.inf, 2, known.best[2:]))]).content[0]
    assert (chat.logprob, chat.bytes, chat.step, chat.top_logprobs) == (LEAST, None, 2, [])
    assert json.loads(text.model_dump_json())
