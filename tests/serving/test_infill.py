"""Gaps of a real tiny model: several, of known and unknown length, and the same through every endpoint."""

import json

import pytest

from coda_serving.gaps import GapReader
from coda_serving.scheduler import CanvasRequest
from CoDALanguageModel import CoDALanguageModel
from CoDALanguageModel.answers import AnswerReader
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.infilling import MAX_CANDIDATES, candidate_lengths

BEFORE, AFTER = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n"
DECODING = {"steps": 64, "temperature": 0.7, "alg_temp": 0.2, "seed": 5}


def test_powers_of_two_and_the_longest_are_tried():
    assert candidate_lengths(1) == [(1,)]
    assert candidate_lengths(12) == [(1,), (2,), (4,), (8,), (12,)]
    assert candidate_lengths(16) == [(1,), (2,), (4,), (8,), (16,)]


@pytest.mark.parametrize("num_gaps", range(1, 7))
def test_gaps_share_the_masks_and_combinations_are_bounded(num_gaps):
    for most in (num_gaps, 20, 1000):
        combinations = candidate_lengths(most, num_gaps)
        assert 1 <= len(combinations) <= MAX_CANDIDATES
        assert len(set(combinations)) == len(combinations)
        assert all(len(each) == num_gaps and min(each) >= 1 and sum(each) <= most for each in combinations)
        assert max(max(each) for each in combinations) == most - num_gaps + 1


def test_too_many_gaps_and_too_few_masks_are_refused():
    with pytest.raises(UserError, match="7 gaps of unknown length"):
        candidate_lengths(100, 7)
    with pytest.raises(UserError, match="3 gaps need at least one mask each, got 2"):
        candidate_lengths(2, 3)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_gaps_are_read_alike_in_any_portions_and_text_is_never_taken_back(serving_fakes, size):
    request = CanvasRequest(
        prompt_ids=tuple(b"p"),
        max_tokens=4,
        suffix_ids=tuple(b"<>"),
        more_gaps=((3, ()), (5, tuple(b"end"))),
        options=serving_fakes.sampling_options(),
        seed=0,
        stop=("!",),
    )
    eos = serving_fakes.EOS

    def reader(prompt_ids):
        return AnswerReader(
            decode=serving_fakes.bytes_to_text, mask_token_id=256, eos_token_ids=frozenset({eos}), stop=request.stop
        )

    gaps = GapReader(request, reader, serving_fakes.bytes_to_text)
    canvas = [*b"ab", eos, *b"z", *b"<>", *b"cde", *b"fg!hi"]
    shown = ""
    for start in range(0, len(canvas), size):
        reading = gaps.feed(canvas[start : start + size], is_full=start + size >= len(canvas))
        assert reading.text.startswith(shown)
        shown = reading.text
        if reading.finish_reason:
            break
    assert (shown, gaps.texts, reading.finish_reason) == ("ab<>cdefg", ("ab", "cde", "fg"), "length")
    assert (reading.num_tokens, reading.stop) == (2 + 3 + 3, "!")


@pytest.fixture(scope="module")
def asked(ask_server, model_folder):
    """The answers of one server to all that the tests of this file ask, which came together."""
    gap = {"max_tokens": 12, **DECODING}
    fim = f"<|fim_prefix|>{BEFORE}<|fim_suffix|>{AFTER}<|fim_middle|>"
    several = {"infill": {"pieces": ["def ", "(a):\n", "return", ""], "lengths": [3, 4, 2]}, **DECODING}
    bodies = {
        "auto": ("/v1/completions", {"infill": {"pieces": [BEFORE, AFTER], "lengths": "auto"}, **gap}),
        "field": ("/v1/completions", {"prompt": BEFORE, "suffix": AFTER, "infill": {}, **gap}),
        "fim": ("/v1/completions", {"prompt": fim, **gap}),
        "mistral": ("/v1/fim/completions", {"prompt": BEFORE, "suffix": AFTER, **gap}),
        "llama": ("/infill", {"input_prefix": BEFORE[:5], "prompt": BEFORE[5:], "input_suffix": AFTER, **gap}),
        "several": ("/v1/completions", several),
        "several streamed": ("/v1/completions", several | {"stream": True}),
        "several auto": (
            "/v1/completions",
            {"infill": {"pieces": ["def ", "(a):\n", "\n"]}, "max_tokens": 6, **DECODING},
        ),
        "one": ("/v1/completions", {"infill": {"pieces": [BEFORE, AFTER], "lengths": [5]}, **DECODING}),
        "suffix": ("/v1/completions", {"prompt": BEFORE, "suffix": AFTER, "max_tokens": 5, **DECODING}),
    }
    responses = dict(zip(bodies, ask_server(model_folder, list(bodies.values()), path=None), strict=True))
    assert {name: r.status_code for name, r in responses.items() if r.status_code != 200} == {}
    return {name: r.text if "stream" in name else r.json() for name, r in responses.items()}


def encode(tokenizer, *pieces):
    return [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]


def test_an_unknown_length_is_decided_as_the_model_room_decides_it(asked, model_folder, chatml_tokenizer):
    model = CoDALanguageModel.from_pretrained(model_folder)
    pieces = encode(chatml_tokenizer, BEFORE, AFTER)
    lengths = [length for (length,) in candidate_lengths(12)]
    expected = model.infill(pieces, infill_lengths=lengths, end_of_gap=True, block_length=32, **DECODING)
    choice = asked["auto"]["choices"][0]
    assert tuple(choice["infill"]["lengths"]) == expected.gap_lengths
    assert choice["infill"]["score"] == pytest.approx(expected.score, abs=1e-5)
    assert choice["text"] == chatml_tokenizer.decode(expected.gaps[0], skip_special_tokens=True)


def test_all_endpoints_fill_a_gap_alike(asked):
    text = asked["auto"]["choices"][0]["text"]
    assert asked["field"]["choices"][0]["text"] == text
    assert asked["fim"]["choices"][0]["text"] == text
    assert asked["mistral"]["choices"][0]["text"] == text
    assert asked["llama"]["content"] == text
    assert asked["one"]["choices"][0]["text"] == asked["suffix"]["choices"][0]["text"]
    usages = [asked[name]["usage"] for name in ("auto", "field", "fim", "mistral", "llama")]
    assert usages == [usages[0]] * 5


def test_several_gaps_are_filled_together(asked, model_folder, chatml_tokenizer):
    model = CoDALanguageModel.from_pretrained(model_folder)
    pieces = encode(chatml_tokenizer, "def ", "(a):\n", "return", "")
    expected = model.infill(pieces, gap_lengths=[3, 4, 2], end_of_gap=True, block_length=32, **DECODING)
    choice = asked["several"]["choices"][0]
    gaps = [chatml_tokenizer.decode(gap, skip_special_tokens=True) for gap in expected.gaps]
    assert choice["infill"]["gaps"] == gaps
    assert choice["infill"]["lengths"] == [3, 4, 2]
    assert choice["text"] == f"{gaps[0]}(a):\n{gaps[1]}return{gaps[2]}"
    chunks = [json.loads(line[6:]) for line in asked["several streamed"].splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]


def test_several_gaps_of_unknown_length_share_max_tokens(asked, model_folder, chatml_tokenizer):
    model = CoDALanguageModel.from_pretrained(model_folder)
    pieces = encode(chatml_tokenizer, "def ", "(a):\n", "\n")
    scores = {
        lengths: model.infill(pieces, gap_lengths=lengths, block_length=32, **DECODING).score
        for lengths in candidate_lengths(6, 2)
    }
    best = max(scores, key=scores.get)
    assert tuple(asked["several auto"]["choices"][0]["infill"]["lengths"]) == best


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"infill": {"pieces": ["a"]}}, "infill.pieces", "at least 2"),
        ({"infill": {"pieces": ["a", "b"], "lengths": [1, 2]}}, "infill.lengths", "one length per gap (1), got 2"),
        ({"infill": {"pieces": ["a", "b"], "lengths": [0]}}, "infill.lengths.0", "greater than or equal to 1"),
        (
            {"infill": {"pieces": ["a", "b"], "lengths": "any"}},
            "infill.lengths",
            "a list of integers of at least 1, or 'auto'",
        ),
        ({"infill": {"pieces": ["a", "b"], "lengths": [3]}, "max_tokens": 4}, "max_tokens", "make 3"),
        ({"infill": {"pieces": ["a", "b"]}, "prompt": "x"}, "infill.pieces", "the whole text"),
        ({"infill": {}, "prompt": "x"}, "infill.pieces", "prompt and suffix around the gap"),
        ({"infill": {"pieces": list("abcdefgh")}}, "infill", "7 gaps of unknown length"),
        ({"infill": {"pieces": ["a", "b", "c"], "pices": 1}}, "infill.pices", "unknown field"),
        ({}, "prompt", "required"),
    ],
)
def test_mistakes_are_named(serve, body, param, words):
    async def test(client):
        return await client.post("/v1/completions", json=body)

    error = serve(test).json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_lengths_to_try_must_fit_in_the_queue(serve):
    async def test(client):
        return await client.post("/v1/completions", json={"infill": {"pieces": ["a", "b"]}, "max_tokens": 16})

    response = serve(test, max_queue=4)
    assert response.status_code == 400
    assert "make 5 answers, more than the queue of 4 holds" in response.json()["error"]["message"]


def test_every_route_documents_its_errors(serve):
    async def test(client):
        return (await client.get("/openapi.json")).json()

    document = serve(test)
    posts = {path: item["post"] for path, item in document["paths"].items() if "post" in item}
    assert {"/infill", "/v1/fim/completions", "/v1/messages", "/v1/messages/count_tokens"} < posts.keys()
    for path, post in posts.items():
        assert {"200", "400", "401", "404", "413", "415", "429", "500", "503", "504"} <= post["responses"].keys(), path
        body = post["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert "steps" in body
        assert ("n" in body) == path.startswith(("/v1/chat", "/v1/completions"))
