"""Served answers are the model's own, alone or in company."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from coda_serving.sampler import ModelSampler, choose_device, choose_dtype
from coda_serving.scheduler import CanvasRequest
from coda_serving.settings import load_settings
from CoDALanguageModel import CoDALanguageModel, DiffusionGenerationConfig


@pytest.fixture(scope="module")
def sampler(model_folder):
    return ModelSampler.load(str(model_folder), device="auto", dtype="auto")


@pytest.fixture(scope="module")
def model(model_folder):
    return CoDALanguageModel.from_pretrained(model_folder)


@pytest.fixture
def ask(serving_fakes):
    def make(prompt, max_tokens=12, seed=0, suffix=None, **options):
        defaults = dict(steps=6, alg_temp=0.2, temperature=0.8, block_length=8)
        return CanvasRequest(
            prompt_ids=tuple(prompt),
            suffix_ids=suffix,
            max_tokens=max_tokens,
            options=serving_fakes.sampling_options(**(defaults | options)),
            seed=seed,
        )

    return make


def run(sampler, requests):
    """The final ids of each answer, up to where its row ends."""
    rows = sampler.start()
    answers = {rows.admit(request): [] for request in requests}
    unfinished = set(answers)
    while unfinished:
        for step in rows.step():
            assert step.error is None
            answers[step.row] += step.ids
            if step.is_full:
                unfinished.remove(step.row)
    assert rows.step() == []
    return list(answers.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alg": "p2"},
        {"temperature": 0.0},
        {"top_p": 0.5, "top_k": 20},
        {"kv_cache": "dual", "threshold": 0.9, "refresh_window": 4},
        {"speculate": 3},
        {"remask": "conf", "eta": 0.5},
        {"suffix_window": 8, "entropy_bound": 0.5, "logit_bias": {"5": 2.0}, "suppress_tokens": [6, 7]},
    ],
)
def test_answers_equal_the_offline_sampler_alone_and_in_a_ragged_batch(sampler, model, ask, options):
    requests = [ask(range(10, 10 + length), seed=length, **options) for length in (1, 7, 3, 12)]
    together = run(sampler, requests)
    for request, answer in zip(requests, together, strict=True):
        settings = dict(steps=6, alg="entropy", alg_temp=0.2, temperature=0.8, block_length=8) | options
        prompt = torch.tensor([request.prompt_ids])
        expected = model.diffusion_generate(prompt, max_new_tokens=12, seed=request.seed, **settings)
        eos = model.config.eos_token_id
        offline = expected[0, prompt.shape[1] :].tolist()
        end = offline.index(eos) if eos in offline else len(offline)
        assert answer[:end] == offline[:end]
        alone = run(sampler, [request])[0]
        assert alone[:end] == offline[:end]


def test_gaps_of_different_length_share_a_batch(sampler, model, ask):
    requests = [ask(range(10, 14), max_tokens=n, seed=n, suffix=tuple(range(20, 20 + n))) for n in (2, 5, 9)]
    for request, answer in zip(requests, run(sampler, requests), strict=True):
        row = [*request.prompt_ids, *[sampler.mask_token_id] * request.max_tokens, *request.suffix_ids]
        expected = model.diffusion_generate(
            torch.tensor([row]),
            max_new_tokens=0,
            seed=request.seed,
            steps=6,
            alg="entropy",
            alg_temp=0.2,
            temperature=0.8,
            block_length=8,
        )
        assert answer == expected[0, 4 : 4 + request.max_tokens].tolist()


def test_each_answer_of_a_mixed_batch_is_that_of_the_request_alone(sampler, ask):
    """Lengths, gaps, orders, temperatures and regimes together, the last ones joining late, one leaving."""
    requests = [
        ask(range(10, 14)),
        ask(range(10, 31), max_tokens=5, seed=1, alg="p2"),
        ask(range(10, 13), max_tokens=9, seed=2, temperature=0.0, kv_cache="dual", threshold=0.5),
        ask(range(10, 14), max_tokens=7, seed=3, suffix=(20, 21, 22), top_p=0.9),
        ask(range(10, 12), max_tokens=20, seed=4, steps=20, speculate=2, logit_bias={"9": 3.0}),
        ask(range(10, 16), max_tokens=16, seed=5, steps=16, remask="conf"),
    ]
    rows, answers = sampler.start(), {}
    unfinished, left = set(), rows.admit(ask(range(10, 40), max_tokens=40, steps=40))
    for step in range(200):
        if step < len(requests):
            row = rows.admit(requests[step])
            answers[row] = []
            unfinished.add(row)
        if step == 3:
            rows.drop(left)
        for told in rows.step():
            if told.row is not left:
                answers[told.row] += told.ids
                if told.is_full:
                    unfinished.remove(told.row)
    assert not unfinished
    assert list(answers.values()) == [run(sampler, [request])[0] for request in requests]


def test_what_of_a_block_may_be_taken_back_is_not_shown(sampler, ask):
    rows = sampler.start()
    row = rows.admit(ask(range(10, 14), max_tokens=12, steps=12, block_length=4, alg="p2", suppress_tokens=[]))
    shown, done = [], False
    while not done:
        (step,) = rows.step()
        shown.append(len(step.ids))
        done = step.is_full
        assert step.row is row
    assert shown == [0, 0, 0, 4] * 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_tokens": 511}, "do not fit in the context of 512"),
        ({"steps": 1}, "steps must be at least the number of blocks"),
        ({"alg": "greedy"}, "alg must be one of"),
        ({"suppress_tokens": [10**6]}, "suppress_tokens must hold token ids in"),
        ({"suppress_tokens": list(range(295))}, "no token may come out"),
    ],
)
def test_what_cannot_be_denoised_is_refused(sampler, ask, changes, words):
    with pytest.raises(ValueError, match=words):
        sampler.check(ask([10, 11], **changes))
    sampler.check(ask([10, 11]))


def test_ids_outside_of_the_vocabulary_and_masks_are_refused(sampler, ask):
    for bad in (-1, sampler.num_token_ids, sampler.mask_token_id):
        with pytest.raises(ValueError, match="prompt ids must be in"):
            sampler.check(ask([10, bad]))
        with pytest.raises(ValueError, match="prompt ids must be in"):
            sampler.check(ask([10], suffix=(bad,)))


def test_devices_and_types_are_resolved():
    assert choose_dtype("auto", "cpu") is torch.float32
    assert choose_dtype("auto", "cuda:0") is torch.bfloat16
    assert choose_dtype("float16", "cpu") is torch.float16
    assert choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match=r"DEVICE=cuda:99: this machine has \d+ cuda devices"):
        choose_device("cuda:99")


def test_dtype_is_the_type_of_the_weights(model_folder, sampler):
    assert next(sampler._model.parameters()).dtype is torch.float32
    half = ModelSampler.load(str(model_folder), device="cpu", dtype="bfloat16")
    assert next(half._model.parameters()).dtype is torch.bfloat16


def test_the_folder_decides_what_the_operator_leaves_open(model_folder, tmp_path, monkeypatch):
    assert ModelSampler.load(str(model_folder), device="cpu", dtype="auto").defaults == {}
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    decided = {"steps": 48, "max_new_tokens": 96, "alg": "maskgit_plus", "temperature": 0.3, "top_p": 0.9}
    decided["stop_strings"] = ["\n\n"]
    (folder / "generation_config.json").write_text(json.dumps(decided))
    loaded = ModelSampler.load(str(folder), device="cpu", dtype="auto")
    assert loaded.stop == ("\n\n",)
    defaults = loaded.defaults
    assert defaults == {"max_tokens": 96, "steps": 48, "alg": "maskgit_plus", "temperature": 0.3, "top_p": 0.9}
    monkeypatch.setenv("STEPS", "64")
    monkeypatch.setenv("MODEL_NAME", str(folder))
    settings = load_settings().with_defaults(defaults)
    assert (settings.steps, settings.max_tokens, settings.top_p, settings.block_length) == (64, 96, 0.9, 32)
    for said, defaults in (
        ({"do_sample": False, "temperature": 0.3, "seed": 7}, {"seed": 7}),
        ({"do_sample": True, "temperature": 0.3, "seed": [1, 2]}, {"temperature": 0.3}),
    ):
        loaded._model.generation_config = DiffusionGenerationConfig(**said)
        assert loaded.defaults == defaults
    assert load_settings().with_defaults({"seed": 7}).seed == 7
    monkeypatch.setenv("SEED", "5")
    assert load_settings().with_defaults({"seed": 7}).seed == 5


def test_a_folder_without_weights_is_named(tmp_path, model_folder):
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    with pytest.raises(ValueError, match=f"MODEL_NAME={tmp_path}"):
        ModelSampler.load(str(tmp_path), device="cpu", dtype="auto")


def test_broken_weights_are_named(tmp_path, model_folder):
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    weights = load_file(model_folder / "model.safetensors")
    weights["model.norm.weight"][0] = 1e30
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"MODEL_NAME={tmp_path}: in torch.float16: .* not finite: model.norm.weight"):
        ModelSampler.load(str(tmp_path), device="cpu", dtype="float16")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=f"MODEL_NAME={tmp_path}: .*model.safetensors' is a Git LFS pointer"):
        ModelSampler.load(str(tmp_path), device="cpu", dtype="auto")


def test_forward_passes_are_counted_and_not_steps(sampler, ask, monkeypatch):
    """Rows with a cache and rows without take a pass each."""
    passes, forward = [], CoDALanguageModel.forward
    monkeypatch.setattr(CoDALanguageModel, "forward", lambda *a, **kw: passes.append(1) or forward(*a, **kw))
    rows = sampler.start()
    rows.admit(ask(range(10, 14)))
    rows.step()
    assert rows.forwards == len(passes) == 1
    rows.admit(ask(range(10, 14), kv_cache="dual"))
    rows.step()
    assert rows.forwards == len(passes) == 3
