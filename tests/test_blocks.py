"""A folder of a model with attention by blocks gives the same answers in the model room, in evaluation and served."""

import functools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from coda_eval.harness import CoDAEvalModel
from CoDALanguageModel import CoDALanguageModel, DiffusionGenerationConfig
from CoDALanguageModel.answers import AnswerReader, end_ids
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.prompts import Codec
from CoDALanguageModel.tools.sample import parse, run

PROMPTS = ["x", "def add(a, b):\n    return", "def add(a, b):\n    return a", "for x in range(10):\n    " * 3]
NO_BYTES = [*range(4, 8), *range(102, 228), *range(229, 264)]
"""Tokens that are not seen in the text, or no more than another one."""
SHARED = {"steps": 12, "suppress_tokens": NO_BYTES}
GREEDY = {"temperature": 0.0, "alg_temp": None, "max_new_tokens": 22, **SHARED}
ASKED = {"temperature": 0, "alg_temp": "none", "max_tokens": 22, **SHARED}


@pytest.fixture(scope="module", params=[True, False], ids=["shifted", "same-position"])
def folder(request, chatml_tokenizer, tmp_path_factory, write_model):
    blocks = {"attention": "block_causal", "block_size": 4, "logits_shift": request.param}
    where = tmp_path_factory.mktemp("blocks") / "model"
    sizes = {"vocab_size": 304, "max_position_embeddings": 256, "initializer_range": 0.5}
    return write_model(where, chatml_tokenizer, seed=1, **sizes, **blocks)


@pytest.fixture(scope="module")
def codec(folder):
    return Codec.load(str(folder))


@pytest.fixture(scope="module")
def expected(folder, codec):
    """The model room's answer to each prompt alone, and what it cost."""
    model = CoDALanguageModel.from_pretrained(folder).eval()
    answers = []
    for prompt in PROMPTS:
        ids = codec.encode_text(prompt)
        output = model.diffusion_generate(torch.tensor([ids]), return_dict_in_generate=True, **GREEDY)
        reader = AnswerReader(
            decode=codec.decode,
            mask_token_id=model.config.mask_token_id,
            eos_token_ids=end_ids(model.config, model.generation_config),
            prompt_ids=ids,
        )
        reading = reader.read(output.sequences[0, len(ids) :].tolist())
        answers.append(SimpleNamespace(text=reading.text, num_tokens=reading.num_tokens, cost=output.cost.as_dict()))
    assert len({answer.text for answer in answers}) == len(PROMPTS)
    return answers


@pytest.fixture(scope="module")
def ask(folder, ask_server):
    """Give a function that has a server around the folder answer requests that come at once."""
    return functools.partial(ask_server, folder)


def test_sample_prints_the_answer_and_keeps_its_steps(folder, chatml_tokenizer, expected, capsys, tmp_path):
    model = CoDALanguageModel.from_pretrained(folder).eval()
    words = [f"--{name}={json.dumps(value)}" for name, value in GREEDY.items()]
    shared = ["--model", "m", "--raw", "--quiet"]
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        run(*parse([*shared, "--prompt", prompt, *words]), chatml_tokenizer, model)
        assert capsys.readouterr().out == answer.text + "\n"
    run(*parse([*shared, "--prompt", "x", "--history", str(tmp_path / "h.jsonl"), *words]), chatml_tokenizer, model)
    frames = list(map(json.loads, (tmp_path / "h.jsonl").read_text().splitlines()))
    assert [len(frame["ids"]) for frame in frames] == [23] * len(frames)
    assert (frames[0]["masks_left"], frames[-1]["masks_left"]) == (22, 0)
    assert len(frames) == expected[0].cost["forwards"] + 2


@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_gets_the_answer_and_its_cost(folder, expected, batch_size):
    model = CoDAEvalModel(str(folder), device="cpu", batch_size=batch_size, **GREEDY)
    asked = [
        SimpleNamespace(args=(prompt, {"until": []}), doc={"task_id": prompt}, task_name="t", doc_id=0, repeats=1)
        for prompt in PROMPTS
    ]
    for given, answer in zip(model.generate_until(asked, True), expected, strict=True):
        assert (given, given.new_tokens) == (answer.text, answer.num_tokens)
        assert given.forwards == given.cost["forwards"]
        assert given.cost["tokens_committed"] == answer.cost["tokens_committed"]
        assert given.cost["tokens_per_forward"] == given.new_tokens / given.forwards
        assert given.cost["tokens_per_forward"] == answer.cost["tokens_per_forward"]
        if batch_size == 1:
            assert given.cost == answer.cost


def test_the_server_gives_the_answer_in_company_streamed_and_several_times(ask, codec, expected):
    alone = [ask([{"prompt": prompt, **ASKED}])[0] for prompt in PROMPTS[:2]]
    shared = {"temperature": 0.8, "seed": 5, "n": 3}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    bodies = [{"prompt": prompt, **ASKED} for prompt in PROMPTS]
    bodies += [{"prompt": PROMPTS[2], **ASKED, **shared}, {"prompt": PROMPTS[0], **ASKED, **streamed}]
    *together, several, stream = ask(bodies)
    for response, answer in zip([*alone, *together], [*expected[:2], *expected], strict=True):
        (choice,), usage = response.json()["choices"], response.json()["usage"]
        assert choice["text"] == answer.text
        assert usage["completion_tokens"] == answer.num_tokens
        assert usage["forwards"] == answer.cost["forwards"]
        assert usage["tokens_per_forward"] == round(answer.cost["tokens_per_forward"], 3)
    each = ask([{"prompt": PROMPTS[2], **ASKED, **shared, "n": 1, "seed": 5 + i} for i in range(3)])
    texts = [choice["text"] for choice in several.json()["choices"]]
    assert texts == [response.json()["choices"][0]["text"] for response in each]
    assert len(set(texts)) == 3
    events = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    pieces = [choice["text"] for event in events for choice in event["choices"]]
    assert "".join(pieces) == expected[0].text
    assert len([piece for piece in pieces if piece]) > 1
    assert events[-1]["usage"]["prompt_tokens"] == len(codec.encode_text(PROMPTS[0]))


@pytest.mark.parametrize(
    "said",
    [
        {"do_sample": False, "temperature": 0.7},
        {"temperature": 0.9, "seed": 7},
        {"temperature": 0.9, "top_k": 2, "seed": 3},
    ],
    ids=["do_sample", "seed", "top_k"],
)
def test_what_a_folder_says_holds_in_every_room(folder, chatml_tokenizer, expected, ask_server, capsys, tmp_path, said):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    settings = {**GREEDY, **said}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    model = CoDALanguageModel.from_pretrained(tmp_path / "model").eval()
    run(*parse(["--model", "m", "--raw", "--quiet", "--prompt", PROMPTS[1]]), chatml_tokenizer, model)
    text = capsys.readouterr().out.removesuffix("\n")
    # What a folder only repeats of the model room's defaults leaves the server its own; of alg_temp they differ.
    (response,) = ask_server(tmp_path / "model", [{"prompt": PROMPTS[1], "alg_temp": "none"}])
    assert response.json()["choices"][0]["text"] == text
    if "do_sample" in said:  # evaluation has a seed for each document
        evaluated = CoDAEvalModel(str(tmp_path / "model"), device="cpu")
        request = SimpleNamespace(args=(PROMPTS[1], {"until": []}), doc={"task_id": "1"}, task_name="t", doc_id=0)
        request.repeats = 1
        assert evaluated.generate_until([request], True) == [text]
    assert (text == expected[1].text) == ("do_sample" in said)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"regex": "[ab]+"}, "generation_config.json: regex cannot be set here: it is said of one answer"),
        ({"json_schema": {"type": "integer"}}, "generation_config.json: json_schema cannot be set here"),
        ({"num_return_sequences": 2}, "generation_config.json: num_return_sequences cannot be set here"),
        ({"seed": [1]}, r"generation_config.json: seed must be one integer here.*, got \[1\]"),
        ({"mask_token_id": 5}, "mask_token_id must be [0-9]+, the token that the model was trained to .*, got 5"),
    ],
)
def test_what_no_folder_may_say_is_refused_in_every_room(folder, chatml_tokenizer, ask_server, tmp_path, said, message):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))

    def sample():
        model = CoDALanguageModel.from_pretrained(tmp_path / "model").eval()
        run(*parse(["--model", "m", "--raw", "--quiet", "--prompt", "x"]), chatml_tokenizer, model)

    for room in (
        sample,
        lambda: ask_server(tmp_path / "model", [{"prompt": "x"}]),
        lambda: CoDAEvalModel(str(tmp_path / "model"), device="cpu"),
    ):
        with pytest.raises(UserError, match=message):
            room()


def test_settings_that_no_folder_may_have_are_not_written(tmp_path):
    settings = DiffusionGenerationConfig(regex="a")
    with pytest.raises(UserError, match="regex cannot be set here"):
        settings.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    settings.merged({"regex": None}).save_pretrained(tmp_path)
    assert DiffusionGenerationConfig.from_pretrained(tmp_path).regex is None


def test_the_server_stops_at_a_string_and_needs_no_steps_for_an_answer_of_any_length(ask, expected):
    stop = expected[0].text[4:6]
    stopped, long = ask([{"prompt": PROMPTS[0], **ASKED, "stop": stop}, {"prompt": "x", "max_tokens": 200, "seed": 1}])
    assert stopped.json()["choices"][0]["text"] == expected[0].text[: expected[0].text.index(stop)]
    assert stopped.json()["usage"]["forwards"] < expected[0].cost["forwards"]
    assert long.status_code == 200


def test_the_server_fills_a_gap_in_the_last_block_and_says_which_models_fill_others(ask):
    filled, refused, other = ask(
        [
            {"prompt": "a", "suffix": "b", "max_tokens": 2},
            {"prompt": "a", "suffix": "b", "max_tokens": 9},
            {"prompt": "a", "suffix": "b", "max_tokens": 9, "steps": 1},
        ]
    )
    assert filled.json()["usage"]["completion_tokens"] <= 2
    assert filled.status_code == 200
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "suffix")
    for words in ("later block", "block_size=4", "attention 'full'"):
        assert words in error["message"]
    assert (other.status_code, other.json()["error"]["param"]) == (400, "steps")


def test_the_server_scores_a_prompt_counts_what_was_shared_and_refuses_unseen_text_behind_a_gap(ask):
    prompt = PROMPTS[3]
    echo = {"prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 0}
    body = {"prompt": prompt, **ASKED}
    fim = {"input_prefix": "a", "input_suffix": "b", "n_predict": 9}
    scored, anew = ask([echo, echo])
    values = scored.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert values[0] is None
    assert all(value < 0 for value in values[1:])
    assert anew.json()["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(values[1:], abs=1e-4)
    alone, *both = [response.json()["usage"] for response in (*ask([body]), *ask([body, body]))]
    assert alone["prompt_tokens_details"] == {"cached_tokens": 0}
    shared = [usage["prompt_tokens_details"]["cached_tokens"] for usage in both]
    assert sorted(shared)[0] == 0
    assert 32 <= sorted(shared)[1] <= alone["prompt_tokens"]
    assert alone["rows"] == alone["forwards"]
    (refused,) = ask([fim], "/infill")
    assert refused.status_code == 400
    assert "later block" in refused.json()["error"]["message"]


def test_the_server_says_how_the_model_attends(ask):
    (card,) = ask([None], "/v1/models")[0].json()["data"]
    assert (card["attention"], card["block_size"]) == ("block_causal", 4)
    assert (card["defaults"]["block_length"], card["defaults"]["steps"]) == (None, 256)


def test_a_gap_whose_right_side_is_invisible_fails_the_task_before_any_answer(folder, monkeypatch):
    model = CoDAEvalModel(str(folder), device="cpu", **GREEDY)
    asked = [
        SimpleNamespace(
            args=("", {"until": []}),
            doc={"task_id": name, "infill_prefix": "a", "infill_middle": "xy", "infill_suffix": behind}
            | {"infill_tokens": 2},
            task_name="gaps",
            doc_id=0,
            repeats=1,
        )
        for name, behind in (("near", "b"), ("far", "b = c"))
    ]
    assert model.generate_until(asked[:1], True)[0].new_tokens <= 2
    monkeypatch.setattr(model, "_answered", lambda jobs: pytest.fail("an answer was begun"))
    with pytest.raises(
        ValueError, match="task gaps, document far: the gap at token 1 .* later block .* attention 'full'"
    ):
        model.generate_until(asked, True)
