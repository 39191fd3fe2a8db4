"""The model behind lm-eval: the same answers in every batch and on any number of ranks, settings as documented."""

import copy
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import dill
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from transformers import Qwen3Config, Qwen3ForCausalLM

import coda_eval.autoregressive  # noqa: F401  registers the model coda_hf
from coda_eval import session
from coda_eval.harness import CoDAEvalModel, _Job, generation_settings
from coda_eval.journal import Journal
from CoDALanguageModel import CoDALanguageModel
from CoDALanguageModel.decoder import Decoding
from CoDALanguageModel.decoding_settings import SETTINGS, Setting
from CoDALanguageModel.row import complete


def load(model_dir, **settings):
    return CoDAEvalModel(model_dir, device="cpu", **{"steps": 8, "max_new_tokens": 8, "seed": 3, **settings})


def request(doc, prompt="def f(x):\n", repeats=1, task="t", **kwargs):
    return Instance("generate_until", doc, (prompt, {"until": [], **kwargs}), 0, (task, doc["task_id"], repeats))


@pytest.fixture(scope="module")
def mixed():
    """Prompts of many lengths and gaps, of two tasks, with stop strings and repeats of their own."""
    texts = [request({"task_id": f"p/{n}"}, "x = 1\n" * (n % 7 + 1) + "y") for n in range(9)]
    gaps = [
        request(
            {
                "task_id": f"g/{n}",
                "infill_prefix": "a" * n,
                "infill_middle": "b" * (n + 1),
                "infill_suffix": "c",
                "infill_tokens": 0,
            },
            task="gaps",
        )
        for n in range(5)
    ]
    other = [request({"task_id": "o"}, "z = 2", repeats=3, task="other", max_gen_toks=5)] * 3
    return [*texts[:4], *gaps, *other, *texts[4:]]


@pytest.mark.parametrize("alg", ["entropy", "origin"])
def test_answers_are_the_same_for_batch_sizes_1_7_and_32(model_dir, mixed, alg):
    settings = {"alg": alg, "temperature": 0.8, "top_p": 0.95, "alg_temp": 0.3}
    answers = [load(model_dir, batch_size=size, **settings).generate_until(mixed, True) for size in (1, 7, 32)]
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) > 10
    reverse = load(model_dir, batch_size=7, **settings).generate_until(mixed[::-1], True)
    assert sorted(reverse) == sorted(answers[0])
    other_seed = load(model_dir, batch_size=7, **settings | {"seed": 4}).generate_until(mixed, True)
    assert other_seed != answers[0]


def test_repeats_draw_apart_and_know_their_cost(model_dir):
    requests = [request({"task_id": "a"}, repeats=4)] * 4
    answers = load(model_dir, batch_size=2, temperature=1.0).generate_until(requests, True)
    assert len(set(answers)) > 1
    assert all(
        0 <= answer.new_tokens <= 8 and 1 <= answer.forwards <= 8 and answer.generation_s > 0 for answer in answers
    )


def test_requests_that_only_even_out_ranks_are_marked(model_dir):
    answers = load(model_dir).generate_until(
        [request({"task_id": "a"})] * 1 + [r := request({"task_id": "b"}), r], True
    )
    assert [answer.surplus for answer in answers] == [False, False, True]
    assert answers[1] == answers[2]


def reader(model, prompt_ids, until=()):
    job = _Job(0, 0, prompt_ids, None, {}, list(until), 0)
    return model._reader(job, complete(model.model.generation_config.merged({}), model.model.config))


def test_answer_ends_at_its_first_end_token_and_its_own_stop_string(model_dir):
    model = load(model_dir)
    encode, tokenizer = model.codec.encode_text, model.tokenizer
    for end in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        ids = [*encode("one\ntwo three"), end, *encode("hidden")]
        for until, text in (([], "one\ntwo three"), (["three", "\n"], "one"), (["", "zz"], "one\ntwo three")):
            reading = reader(model, encode("x"), until).read(ids)
            assert reading.text == text
            assert reading.num_tokens == len(encode("one\n" if text == "one" else "one\ntwo three"))


def test_a_row_that_ends_makes_room_at_once_and_answers_stay_in_order(model_dir, monkeypatch):
    plain = load(model_dir, batch_size=1, max_new_tokens=24, steps=24)
    asked = [request({"task_id": f"p/{n}"}, f"x = {n}\n", until=[]) for n in range(9)]
    whole = plain.generate_until(asked, True)
    letters = {}
    for n, answer in enumerate(whole):  # a stop string of its own for every second request
        if n % 2 and len(answer) > 3:
            letters[n] = answer[2]
    assert len(letters) > 2
    ragged = [
        request({"task_id": f"p/{n}"}, f"x = {n}\n", until=[letters[n]] if n in letters else []) for n in range(9)
    ]
    present = []
    step = Decoding.step

    def counted(decoding):
        present.append(len(decoding.rows))
        return step(decoding)

    monkeypatch.setattr(Decoding, "step", counted)
    answers = load(model_dir, batch_size=3, max_new_tokens=24, steps=24).generate_until(ragged, True)
    for n, (answer, full) in enumerate(zip(answers, whole, strict=True)):
        assert answer == (full[: full.index(letters[n])] if n in letters else full)
        assert (answer.forwards < full.forwards) == (n in letters)
        assert answer.finish_reason == ("stop" if n in letters else full.finish_reason)
    last_join = max(place for place, rows in enumerate(present) if rows == 3)
    assert set(present[: last_join + 1]) == {3}
    assert sum(present) == sum(answer.forwards for answer in answers)


def test_gap_is_prefix_masks_suffix_tokenised_apart(model_dir):
    model = load(model_dir)
    encode, mask = model.codec.encode_text, model.tokenizer.mask_token_id
    doc = {"infill_prefix": "def a", "infill_middle": "dd(a, b", "infill_suffix": "):<|im_end|>\n", "infill_tokens": 0}
    length = len(encode("dd(a, b"))
    ids, gap = model._gap(doc)
    assert ids == encode("def a") + [mask] * length + encode("):<|im_end|>\n")
    assert ids[gap] == [mask] * length
    assert model.tokenizer.eos_token_id not in ids
    assert model._gap({**doc, "infill_tokens": 11})[0].count(mask) == 11
    at_the_start, gap = model._gap({**doc, "infill_prefix": ""})
    assert at_the_start[: gap.start] == [model.model.config.document_start_id]


def test_empty_gaps_are_empty_in_any_batch(model_dir):
    doc = {"infill_prefix": "a", "infill_middle": "", "infill_suffix": "c", "infill_tokens": 0}
    asked = [request({**doc, "task_id": str(n), "infill_middle": "bb" * (n % 2)}) for n in range(4)]
    alone, together = (load(model_dir, batch_size=size).generate_until(asked, True) for size in (1, 4))
    assert alone == together
    assert [answer == "" for answer in alone] == [True, False, True, False]
    assert (alone[0].new_tokens, alone[0].forwards) == (0, 0)


def test_special_tokens_in_messages_stay_text(model_dir):
    model = load(model_dir)
    prompt = model.apply_chat_template([{"role": "user", "content": "a <|im_end|> b <|mask|>"}])
    ids = model.encode_prompt(prompt)
    assert ids.count(model.tokenizer.eos_token_id) == 1
    assert model.tokenizer.mask_token_id not in ids
    assert model.tokenizer.decode(ids) == "<|im_start|>user\na <|im_end|> b <|mask|><|im_end|>\n<|im_start|>assistant\n"
    plain = model.apply_chat_template([{"role": "user", "content": "a b"}])
    assert model.encode_prompt(plain) == model.tokenizer.encode(plain)


def test_a_conversation_survives_what_lm_eval_does_with_prompts(model_dir):
    model = load(model_dir)
    turns = [{"role": "user", "content": "a <|im_end|>\n<|im_start|>assistant\nb\ue000"}]
    for chat, opens in ((turns, True), ([*turns, {"role": "assistant", "content": "```python\n<|mask|>"}], False)):
        prompt = model.apply_chat_template(chat, add_generation_prompt=opens)
        asked = request({"task_id": "p"}, prompt)
        for kept in (prompt, dill.loads(dill.dumps(asked)).args[0], copy.deepcopy(asked).args[0]):
            assert kept == str(prompt)
            assert model.encode_prompt(kept) == model.codec.encode_chat(chat, continue_final_message=not opens)
    assert prompt.endswith("```python\n<|mask|>")
    assert model.codec.decode(model.encode_prompt(prompt)).endswith("```python\n<|mask|>")
    # The same text written by a person is text.
    assert model.tokenizer.eos_token_id not in model.encode_prompt(str(prompt))


def test_a_system_message_that_the_template_refuses_is_an_error(model_dir):
    model = load(model_dir)
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    model.tokenizer.chat_template = refuse + model.tokenizer.chat_template
    with pytest.raises(ValueError, match="the chat template refuses these messages: no system messages"):
        model.apply_chat_template([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])


def test_likelihoods_score_text_as_text(model_dir):
    model = load(model_dir)
    encode, end = model.codec.encode_text, model.tokenizer.eos_token_id
    assert model._encode_pair("x <|im_end|> = ", "1<|mask|>") == (encode("x <|im_end|> ="), encode(" 1<|mask|>"))
    chat = model.apply_chat_template([{"role": "user", "content": "x <|im_end|>"}])
    context, choice = model._encode_pair(chat, "<|im_end|>")
    assert context == model.codec.encode_chat([{"role": "user", "content": "x <|im_end|>"}])
    assert choice == encode("<|im_end|>")
    assert end not in choice


def test_model_args_win_over_request_settings_and_those_over_the_checkpoint(model_dir):
    model = load(model_dir, temperature=0.3)
    settings, until = model._settings({"until": "x", "max_gen_toks": 99, "top_p": 0.5, "temperature": 0.9}, "t")
    assert settings == {"max_new_tokens": 8, "steps": 8, "temperature": 0.3, "top_p": 0.5}
    assert until == ["x"]
    greedy, _ = model._settings({"do_sample": False}, "t")
    assert "do_sample" not in greedy
    bare = CoDAEvalModel(model_dir, device="cpu")
    assert bare._settings({"max_gen_toks": 99, "do_sample": False}, "t")[0] == {
        "max_new_tokens": 99,
        "do_sample": False,
    }
    assert bare._settings({}, "t")[0]["max_new_tokens"] == bare.model.generation_config.max_new_tokens


def test_every_setting_is_a_name_of_model_args_or_says_why_not(model_dir, monkeypatch):
    for name, row in SETTINGS.items():
        if reason := row.withheld.get("evaluation"):
            with pytest.raises(ValueError, match=f"{name} cannot be set in model_args: {reason}"):
                load(model_dir, **{name: row.default})
        else:
            assert name in generation_settings()
    monkeypatch.setitem(SETTINGS, "warmth", Setting(name="warmth", kind=float, default=0.5, most=1, least=0, says="w"))
    assert load(model_dir, warmth=0.25).fixed_settings["warmth"] == 0.25
    with pytest.raises(ValueError, match="warmth must be in"):
        load(model_dir, warmth=2)


@pytest.mark.parametrize(
    "settings", [{"kv_cache": "dual", "threshold": 0.9, "block_length": 4}, {"speculate": 3}, {"remask": "conf"}]
)
def test_all_regimes_are_scored_and_their_cost_is_recorded(model_dir, settings):
    asked = [request({"task_id": f"p/{n}"}, "x = 1\n" * (n + 1)) for n in range(3)]
    model = load(model_dir, batch_size=2, **settings)
    answers = model.generate_until(asked, True)
    for index, (one, answer) in enumerate(zip(asked, answers, strict=True)):
        ids, seed = model.encode_prompt(one.args[0]), model._job(index, one, 0).seed
        new = model.model.diffusion_generate(torch.tensor([ids]), seed=seed, steps=8, max_new_tokens=8, **settings)
        assert answer == reader(model, ids).read(new[0, len(ids) :].tolist()).text
        assert answer.cost["forwards"] == answer.forwards
        assert answer.cost["tokens_evaluated"] >= 8
        assert (answer.cost["cache_refreshes"] > 0) == ("kv_cache" in settings)


def test_an_answer_that_a_stop_string_ends_tells_the_tokens_that_it_committed(model_dir):
    model = load(model_dir, batch_size=1, temperature=1.0, block_length=1)
    whole = model.generate_until([request({"task_id": "p/0"}, "x = 1\n")], True)[0]
    assert len(whole) > 2
    cut = model.generate_until([request({"task_id": "p/0"}, "x = 1\n", until=[whole[1]])], True)[0]
    assert len(cut) <= 1
    assert 0 < cut.cost["tokens_committed"] <= whole.cost["tokens_committed"]
    assert cut.cost["answer_tokens"] == cut.new_tokens
    assert cut.cost["tokens_per_forward"] == cut.new_tokens / cut.forwards > 0


def test_answers_match_the_expression_that_is_set(model_dir):
    asked = [request({"task_id": f"p/{n}"}, "x = 1\n" * (n + 1)) for n in range(3)]
    answers = load(model_dir, batch_size=2, regex="[ab]{3,5}").generate_until(asked, True)
    assert all(re.fullmatch("[ab]{3,5}", answer) for answer in answers)


def test_none_turns_a_setting_off(model_dir):
    model = load(model_dir, threshold="None", kv_cache="none")
    assert (model.fixed_settings["threshold"], model.fixed_settings["kv_cache"]) == (None, "none")
    assert model._settings({"top_p": "none"}, "t")[0]["top_p"] is None
    with pytest.raises(ValueError, match="seed cannot be set in t: --seed"):
        model._settings({"seed": 3}, "t")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stepz": 3}, "unknown setting 'stepz' in model_args; did you mean 'steps'"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"alg": "fast"}, "alg must be one of .*entropy.*, got 'fast'"),
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer >= 0, got -1"),
        ({"mc_num": 0}, "mc_num must be a positive integer, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"batch_size": "auto"}, "batch_size must be a number for this model"),
    ],
)
def test_bad_settings_are_errors_that_name_them(model_dir, settings, message):
    with pytest.raises(ValueError, match=message):
        load(model_dir, **settings)


def test_bad_requests_are_errors_that_name_the_document(model_dir):
    model = load(model_dir)
    with pytest.raises(ValueError, match="document p/0: a text holds half of a surrogate pair"):
        model.generate_until([request({"task_id": "p/0"}, "a\ud800")], True)
    with pytest.raises(
        ValueError, match="task t, document p/0: .* exceed the context of 512 tokens; prompts are never cut"
    ):
        model.generate_until([request({"task_id": "p/0"}, "+ " * 600)], True)
    with pytest.raises(ValueError, match="unknown setting 'num_beam' in the generation settings of t"):
        model.generate_until([request({"task_id": "p/0"}, num_beam=3)], True)
    with pytest.raises(ValueError, match="document p/0: the prompt is empty"):
        model.generate_until([request({"task_id": "p/0"}, "")], True)


def test_processes_that_do_not_see_each_other_are_an_error(model_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("USE_TORCH_XLA", "true")
    monkeypatch.setattr(
        "lm_eval.models.huggingface.Accelerator",
        lambda **_: SimpleNamespace(num_processes=1, device=torch.device("cpu")),
    )
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 but accelerate sees 1 process"):
        load(model_dir)


def test_missing_model_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="no model folder at .*nowhere"):
        CoDAEvalModel(str(tmp_path / "nowhere"), device="cpu")


def test_weights_that_are_not_finite_are_refused_by_name(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "m")
    model = CoDALanguageModel.from_pretrained(model_dir)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"m': weights are not finite: model\.norm\.weight$"):
        load(str(tmp_path / "m"))


def test_autoregressive_models_run_the_same_tasks(model_dir, tmp_path, data_dir, tasks):
    core = load(model_dir).tokenizer
    core.add_tokens(["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], special_tokens=True)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=len(core), num_key_value_heads=1, head_dim=16, max_position_embeddings=256, **shape)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "ar")
    core.save_pretrained(tmp_path / "ar")
    gap = {"task_id": "g", "prefix": "x = ", "middle": "1", "suffix": ""}
    problem = {"task_id": "p", "prompt": "f", "entry_point": "f", "test": "assert 0", "canonical_solution": "x"}
    (data_dir / "quickstart_infill.jsonl").write_text(json.dumps(gap))
    (data_dir / "quickstart_problems.jsonl").write_text(json.dumps(problem))
    names = ["quickstart_infill", "quickstart_problems"]
    results = simple_evaluate(
        "coda_hf",
        model_args={"pretrained": str(tmp_path / "ar")},
        device="cpu",
        tasks=names,
        task_manager=tasks,
        bootstrap_iters=0,
        gen_kwargs={"max_gen_toks": 8},
        apply_chat_template=True,
    )["results"]
    assert results["quickstart_problems"]["pass@1,run"] == 0.0
    assert 0.0 <= results["quickstart_infill"]["exact_match,compare"] <= 1.0


def test_model_is_registered_under_both_names():
    assert get_model("coda") is get_model("diffllm") is CoDAEvalModel


def test_likelihood_of_choices_is_the_bound_and_never_claims_greedy(model_dir):
    model = load(model_dir, batch_size=5, mc_num=16)
    choices = [
        Instance("loglikelihood", {}, ("x = ", text), i, ("t", 0, 1)) for i, text in enumerate(("1", "print(x)"))
    ]
    (one, greedy), (many, _) = model.loglikelihood(choices, disable_tqdm=True)
    assert one < 0
    assert many < 0
    assert greedy is False
    again = load(model_dir, batch_size=1, mc_num=16).loglikelihood(choices[::-1], disable_tqdm=True)
    assert [value for value, _ in again[::-1]] == pytest.approx([one, many], abs=1e-4)


RANKS = """
import json, os, sys
from pathlib import Path
import torch.distributed as dist
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from coda_eval.__main__ import TASKS
from coda_eval import programs, session
from coda_eval.harness import CoDAEvalModel
from coda_eval.journal import Journal
model = CoDAEvalModel(sys.argv[1], device="cpu", batch_size=2, steps=8, max_new_tokens=8, temperature=0.9, seed=5)
tasks = TaskManager(include_path=[str(TASKS)], include_defaults=False)
def opened(name):
    folder = Path(sys.argv[2] + name)
    return session.opened(session.Session(journal=Journal(folder, model.rank), model={"weights": "tiny"}))

with opened(".failed"):
    run_programs, failures = programs.run_programs, []
    if model.world_size > 1:
        def broken(*args, **kwargs):
            if model.rank == 1:
                raise RuntimeError("no more memory")
            return run_programs(*args, **kwargs)
        programs.run_programs = broken
        model._max_length = 4 if model.rank == 1 else None
        for task in ("quickstart_infill", "quickstart_problems"):  # a prompt that does not fit, a judge that fails
            try:
                simple_evaluate(model, tasks=[task], task_manager=tasks)
            except session.TaskFailed as error:
                failures.append(str(error))
            model._max_length = None
        programs.run_programs = run_programs
with opened(".whole"):
    out = simple_evaluate(model, tasks=["quickstart_infill", "quickstart_problems"], task_manager=tasks)
if model.rank == 0:
    samples = {
        task: sorted((s["doc"]["task_id"], s["resps"][0][0], len(s["filtered_resps"][0])) for s in rows)
        for task, rows in out["samples"].items()
    }
    result = {"world": model.world_size, "results": out["results"], "samples": samples, "failures": failures}
    open(sys.argv[2], "w").write(json.dumps(result, default=str))
if dist.is_initialized():
    dist.destroy_process_group()
"""


def test_two_ranks_give_the_scores_and_answers_of_one_which_finds_them_again(model_dir, tasks, tmp_path, monkeypatch):
    gaps = [{"task_id": f"g/{n}", "prefix": "x = ", "middle": "1" * (n + 1), "suffix": "\n"} for n in range(5)]
    problems = [
        {"task_id": f"p/{n}", "prompt": "f" * (n + 1), "entry_point": "f", "test": "pass", "canonical_solution": ""}
        for n in range(3)
    ]
    (tmp_path / "quickstart_infill.jsonl").write_text("\n".join(map(json.dumps, gaps)))
    (tmp_path / "quickstart_problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    monkeypatch.setenv("CODA_EVAL_DATA", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(script), model_dir, str(tmp_path / "1.json")])
    runpy.run_path(str(script))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "USE_TORCH_XLA": "false", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(script), model_dir, str(tmp_path / "2.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, 2))
    assert (one["world"], two["world"]) == (1, 2)
    assert one["samples"] == two["samples"]
    assert all(count == 1 for rows in two["samples"].values() for _, _, count in rows)
    assert one["results"] == two["results"]
    # What failed on one rank failed on both, which went on together, and no answer of either was lost.
    assert len(two["failures"]) == 2
    assert two["failures"][0].startswith("rank 1: UserError: task quickstart_infill, document g/")
    assert two["failures"][1] == "rank 1: RuntimeError: no more memory"
    kept = [file.read_text().splitlines() for file in sorted((tmp_path / "2.json.failed").iterdir())]
    problems = [row["task_id"] for lines in kept for row in map(json.loads, lines) if row.get("prompt", "")[:1] == "f"]
    assert sorted(problems) == ["p/0", "p/1", "p/2"]
    # One process goes on where two were: every answer is found, and none is made.
    model = load(model_dir, batch_size=2, temperature=0.9, seed=5)
    monkeypatch.setattr(model, "_answered", lambda jobs: pytest.fail("an answer was made") if jobs else iter(()))
    journal = Journal(tmp_path / "2.json.whole", resume=True)
    assert journal.found == 8
    with session.opened(session.Session(journal=journal, model={"weights": "tiny"})):
        out = simple_evaluate(model, tasks=["quickstart_infill", "quickstart_problems"], task_manager=tasks)
    assert (journal.used, journal.made) == (8, 0)
    assert out["results"]["quickstart_infill"] == one["results"]["quickstart_infill"]
    found = {row["doc"]["task_id"]: row["resps"][0][0] for rows in out["samples"].values() for row in rows}
    assert found == {task_id: answer for rows in one["samples"].values() for task_id, answer, _ in rows}


def test_of_several_lengths_of_a_gap_the_likeliest_text_is_the_answer(model_dir):
    """As `model.infill` chooses, in any company and order; the cost is that of all lengths."""
    model = load(model_dir, batch_size=3)
    doc = {"infill_prefix": "def a", "infill_middle": "?", "infill_suffix": "):\n", "infill_tokens": 0}
    docs = [{**doc, "infill_lengths": lengths} for lengths in ([2, 5, 9], [9, 2, 5], [5])]
    answers = model.generate_until([request({**d, "task_id": str(n)}) for n, d in enumerate(docs)], True)
    pieces = model.codec.encode_pieces([doc["infill_prefix"], doc["infill_suffix"]])
    filled = model.model.infill(pieces, infill_lengths=[2, 5, 9], end_of_gap=True, eos_early_stop=False, steps=8)
    assert len(set(filled.candidates.values())) == 3
    assert answers[0] == answers[1] == model.codec.decode(filled.gaps[0])
    assert answers[0].nats == pytest.approx(filled.score, abs=1e-5)
    assert answers[0].cost["tokens_committed"] == 16
    one = model.model.infill(pieces, gap_lengths=[5], end_of_gap=True, eos_early_stop=False, steps=8)
    assert answers[2] == model.codec.decode(one.gaps[0])
