"""What a run does, observed from outside: one process trains several tiny runs, each test reads one fact."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from coda_posttrain.__main__ import main
from coda_posttrain.arguments import DiffusionArguments
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.run_files import claimed

REPO = Path(__file__).resolve().parents[2]
CONFIG = REPO / "post-train/LLaMA-Factory/examples/train_full/quickstart.yaml"
ZERO3 = REPO / "post-train/LLaMA-Factory/examples/deepspeed/zero3.json"
DEEPSPEED = Path(sys.prefix) / "deepspeed"
"""Where test.sh installs it."""
DRIVER = """
import contextlib, io, json, pathlib, sys
from coda_posttrain.__main__ import main
commands, refused, model_dir = json.loads(sys.argv[1])
for argv in commands:
    print("RUN", argv, flush=True)
    status = main(argv)
    if status:
        sys.exit(status)
for number, argv in enumerate(refused):
    with contextlib.redirect_stderr(io.StringIO()) as told:
        assert main(argv) == 2
    pathlib.Path(f"refused_{number}.txt").write_text(told.getvalue())

from llamafactory.data.template import TEMPLATES
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(model_dir)
turns = [{"role": role, "content": text} for role, text in (
    ("user", "add 3 to x"), ("assistant", "def f(x):\\n    return x + 3"), ("user", " again\\n"), ("assistant", "ok"))]
trained = {}
for system in (None, "be brief"):
    pairs = TEMPLATES["qwen3_nothink"].encode_multiturn(tokenizer, turns, system)
    chat = ([{"role": "system", "content": system}] if system else []) + turns
    expected = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    prompt = tokenizer.apply_chat_template(chat[:-3], tokenize=True, return_dict=False, add_generation_prompt=True)
    trained[str(system)] = [sum((a + b for a, b in pairs), []), expected, pairs[0][0], prompt]
pathlib.Path("tokens.json").write_text(json.dumps(trained))
"""

PAIR_DRIVER = """
import json, os, sys
import torch.distributed as dist
from coda_posttrain.__main__ import main
from CoDALanguageModel import diffusion
commands = json.loads(sys.argv[1])
dist.init_process_group("gloo")
dist.destroy_process_group = lambda *group: None  # one group for all runs
if any("deepspeed=" in word for word in commands[-1]):
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo alone: the other would be compiled here
diffusion.LOSS_CHUNK_ELEMENTS = 264 * 10  # chunks of 10 tokens: the processes have unlike numbers of them
for argv in commands:
    status = main(argv)
    if status:
        sys.exit(status)
"""


def odd_settings(block_dirs) -> dict[str, dict]:
    """Two epochs with a short last step, once for each denominator of the loss, and once by blocks with all options."""
    changes = {"dataset": "odd", "max_steps": -1, "num_train_epochs": 2, "diffusion.prompt_annealing_epochs": 1.5}
    by_blocks = {"model_name_or_path": block_dirs[4], "diffusion.objective": "joint", "diffusion.complementary": "true"}
    by_blocks |= {"diffusion.autoregressive_weight": 0.5, "diffusion.span_probability": 0.5}
    return {
        **{name: {**changes, "diffusion.normalize": name} for name in ("maskable", "row", "padded")},
        "joint": {**changes, **by_blocks},
    }


def settings(model_dir, data_dir, **changes) -> list[str]:
    values = {
        "model_name_or_path": model_dir,
        "dataset_dir": data_dir,
        "dataset": "train",
        "eval_dataset": "held_out",
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "max_steps": 20,
        "num_train_epochs": 3,
        "diffusion.tail_tokens": 16,
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train_lines(folder: Path) -> list[dict]:
    return [line for line in metrics(folder) if "loss" in line]


def eval_losses(folder: Path) -> list[float]:
    return [line["eval_loss"] for line in metrics(folder) if "eval_loss" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_dir, block_dirs, data_dir, environment) -> Path:
    """One process: a full run, its resumption, evaluations, accumulation, annealing, LoRA and its merge."""
    out = tmp_path_factory.mktemp("runs")
    broken = shutil.copytree(model_dir, out / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    make = lambda name, **changes: [  # noqa: E731
        "train", str(CONFIG), *settings(model_dir, data_dir, output_dir=out / name, **changes)
    ]  # fmt: skip
    evaluate = {"do_train": "false", "do_eval": "true", "eval_strategy": "no", "model_name_or_path": out / "full"}
    short = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 3, "diffusion.span_probability": "[0.5]"}
    lora = {"finetuning_type": "lora", "lora_target": "all", "lora_rank": 4, "learning_rate": 0.02}
    full = {"save_strategy": "steps", "save_steps": 10, "eval_strategy": "steps", "eval_steps": 5}
    commands = [
        make("full", **full),
        make("resumed", **full, resume_from_checkpoint=out / "full/checkpoint-10"),
        make("eval_5", **evaluate, per_device_eval_batch_size=5),
        make("eval_12", **evaluate, per_device_eval_batch_size=12),
        make("batch_8x1", **short, per_device_train_batch_size=1, gradient_accumulation_steps=8),
        make("batch_1x8", **short),
        make(
            "annealed", eval_strategy="epoch", save_strategy="epoch", max_steps=-1, num_train_epochs=3,
            load_best_model_at_end="true", metric_for_best_model="eval_loss", early_stopping_steps=3,
            **{"diffusion.prompt_annealing_epochs": 1.0, "diffusion.t_min": "[0.001,0.25]", "diffusion.tail": "pad",
               "diffusion.normalize": "padded", "diffusion.overlong": "drop", "cutoff_len": 96,
               "diffusion.span_probability": "[0.25,0.5,0.75]", "diffusion.span_lengths": "[4,8,16,32]"},
        ),
        *(make(f"odd_{name}", **changes) for name, changes in odd_settings(block_dirs).items()),
        make("lora", **lora),
        make("block_lora", **lora, **{"model_name_or_path": block_dirs[4], "diffusion.objective": "block"}),
        make("autoregressive", **evaluate | {"model_name_or_path": block_dirs[1], "diffusion.objective": "block"}),
        [
            "export", str(out / "merge.yaml"), f"model_name_or_path={model_dir}",
            f"adapter_name_or_path={out / 'lora'}", f"export_dir={out / 'merged'}",
        ],
    ]  # fmt: skip
    refused = [
        make("refused", accelerator_config="{even_batches: false}", eval_strategy="no", eval_dataset="null"),
        make(
            "refused",
            **lora,
            **{"model_name_or_path": block_dirs[4], "diffusion.objective": "joint"},
            **{"diffusion.autoregressive_weight": 1},
        ),
        make("refused", model_name_or_path=broken),
    ]
    merge = {"template": "qwen3_nothink", "finetuning_type": "lora", "infer_dtype": "float32"}
    (out / "merge.yaml").write_text(yaml.safe_dump(merge))
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([commands, refused, str(model_dir)])],
        env=environment, cwd=out, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return out


def test_evaluation_loss_falls(runs):
    losses = eval_losses(runs / "full")
    assert len(losses) == 4
    assert losses[-1] < 0.85 * losses[0]


def test_metrics_have_the_agreed_keys_once_per_step(runs):
    lines = train_lines(runs / "full")
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert {"step", "loss", "learning_rate", "tokens", "tokens_per_s", "time_s"} <= lines[-1].keys()
    assert all(later["tokens"] > earlier["tokens"] for earlier, later in zip(lines, lines[1:], strict=False))


def test_resumed_run_ends_bit_identical(runs):
    full, resumed = (load_file(runs / name / "model.safetensors") for name in ("full", "resumed"))
    assert full.keys() == resumed.keys()
    assert all(torch.equal(full[name], resumed[name]) for name in full)
    before = [(line["step"], line["loss"]) for line in train_lines(runs / "full")[10:]]
    assert [(line["step"], line["loss"]) for line in train_lines(runs / "resumed")] == before


def test_evaluation_loss_repeats_and_ignores_the_batch_size(runs):
    last = eval_losses(runs / "full")[-1]
    results = [json.loads((runs / name / "eval_results.json").read_text()) for name in ("eval_5", "eval_12")]
    assert [result["eval_loss"] for result in results] == pytest.approx([last, last], rel=1e-6)


def test_blocks_of_one_are_evaluated_as_the_autoregressive_model_is(runs, block_dirs, data_dir):
    tokenizer = AutoTokenizer.from_pretrained(block_dirs[1])
    config = json.loads((block_dirs[1] / "config.json").read_text())
    names = [field.name for field in dataclasses.fields(Qwen3Config)]
    twin = Qwen3ForCausalLM(Qwen3Config(**{name: config[name] for name in names if name in config})).eval()
    twin.load_state_dict(load_file(block_dirs[1] / "model.safetensors"), strict=False)
    twin.tie_weights()
    loss, count = 0.0, 0
    for line in (data_dir / "held_out.jsonl").read_text().splitlines():
        row = json.loads(line)
        chat = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        render = functools.partial(tokenizer.apply_chat_template, tokenize=True, return_dict=False)
        prompt, ids = render(chat[:1], add_generation_prompt=True), render(chat)
        with torch.no_grad():
            logits = twin(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        target = torch.tensor(ids[len(prompt) :])
        loss += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        count += len(target)
    result = json.loads((runs / "autoregressive" / "eval_results.json").read_text())
    assert result["eval_loss"] == pytest.approx(loss / count, rel=1e-5)


def test_a_model_by_blocks_learns_with_adapters_and_keeps_its_attention(runs):
    losses = eval_losses(runs / "block_lora")
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.01
    saved = json.loads((runs / "odd_joint" / "config.json").read_text())
    assert (saved["block_size"], saved["causal_context"]) == (4, True)
    assert "which an adapter does not carry" in (runs / "refused_1.txt").read_text()
    lines = train_lines(runs / "odd_joint")
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in train_lines(runs / "odd_row")]


def test_accumulation_equals_the_whole_batch_in_loss_and_gradient(runs):
    split, whole = train_lines(runs / "batch_8x1"), train_lines(runs / "batch_1x8")
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in split] == pytest.approx([line[key] for line in whole], rel=1e-4)


def test_curriculum_follows_the_epochs(runs):
    lines = train_lines(runs / "annealed")  # 64 rows in batches of 8: 8 steps an epoch
    assert [line["conditioned_share"] for line in lines[:9]] == pytest.approx([i / 8 for i in range(8)] + [1.0])
    assert [line["t_min"] for line in lines[::8]] == [0.001, 0.25, 0.001]
    assert [line["span_probability"] for line in lines[::8]] == [0.25, 0.5, 0.75]


def test_padding_up_to_cutoff_len_is_learned_with_the_published_tail(runs):
    lines = train_lines(runs / "annealed")
    assert lines[0]["tokens"] == 8 * 96


def test_processes_with_unlike_numbers_of_batches_are_refused(runs):
    assert "accelerator_config.even_batches=false" in (runs / "refused_0.txt").read_text()


def test_weights_that_are_not_finite_are_refused_by_name(runs):
    assert "broken': weights are not finite: model.norm.weight" in (runs / "refused_2.txt").read_text()


def test_template_gives_the_token_ids_of_the_chat_template(runs):
    for trained, expected, first_prompt, generation_prompt in json.loads((runs / "tokens.json").read_text()).values():
        assert trained == expected
        assert first_prompt == generation_prompt


def test_saved_folder_keeps_token_ids_decoding_settings_and_tokenizer(runs, model_dir):
    for name in ("full", "full/checkpoint-10", "merged"):
        folder = runs / name
        config, source = (json.loads((d / "config.json").read_text()) for d in (folder, model_dir))
        for key in ("eos_token_id", "bos_token_id", "pad_token_id", "mask_token_id", "num_token_ids", "auto_map"):
            assert config[key] == source[key], (name, key)
        assert (folder / "generation_config.json").read_bytes() == (model_dir / "generation_config.json").read_bytes()
        trained, original = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(model_dir)
        assert trained.get_vocab() == original.get_vocab()
        assert trained.chat_template == original.chat_template
        assert trained.eos_token == original.eos_token == "<|im_end|>"


def test_weights_are_open_to_whom_the_other_files_are(runs):
    for folder, configuration in (
        ("full", "config.json"), ("full/checkpoint-10", "config.json"), ("lora", "adapter_config.json"),
        ("merged", "config.json"),
    ):  # fmt: skip
        weights = list((runs / folder).glob("*.safetensors"))
        modes = {file.stat().st_mode for file in weights}
        assert modes == {(runs / folder / configuration).stat().st_mode}, folder


def test_run_config_is_saved_beside_every_checkpoint(runs):
    for folder in (runs / "full", runs / "full/checkpoint-10", runs / "lora"):
        assert yaml.safe_load((folder / "run_config.yaml").read_text())["diffusion"]["tail_tokens"] == 16


def test_lora_changes_only_the_adapted_weights(runs, model_dir):
    base, merged = load_file(model_dir / "model.safetensors"), load_file(runs / "merged/model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    assert all("_proj" in name for name in changed)


def test_checkpoint_loads_elsewhere_with_remote_code(runs, environment, tmp_path):
    code = (
        "import sys, torch\n"
        "from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer\n"
        "for auto in (AutoModel, AutoModelForCausalLM):\n"
        "    for folder in sys.argv[1:]:\n"
        "        model = auto.from_pretrained(folder, trust_remote_code=True)\n"
        "        tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "        ids = tokenizer('<|im_start|>user\\nadd 3 to x<|im_end|>\\n', return_tensors='pt').input_ids\n"
        "        out = model.diffusion_generate(ids, max_new_tokens=8, steps=8)\n"
        "        assert out.shape == (1, ids.shape[1] + 8), out.shape\n"
        "        assert 'CoDALanguageModel' not in sys.modules\n"
    )
    elsewhere = {**environment, "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", code, str(runs / "full"), str(runs / "merged")],
        env=elsewhere, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def pairs(runs, model_dir, block_dirs, data_dir, environment) -> Path:
    """The runs of `odd_settings` again, in two processes, and one with sharded weights."""
    few = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 5}
    few |= {"save_strategy": "steps", "save_steps": 2}
    commands = [
        ["train", str(CONFIG), *settings(model_dir, data_dir, output_dir=runs / f"pair_{name}", **changes, **few)]
        for name, changes in odd_settings(block_dirs).items()
    ]
    resumed = {
        **odd_settings(block_dirs)["row"],
        **few,
        "resume_from_checkpoint": runs / "pair_row/checkpoint-4",
        "output_dir": runs / "pair_resumed",
    }
    commands.append(["train", str(CONFIG), *settings(model_dir, data_dir, **resumed)])
    if DEEPSPEED.is_dir():
        for name in ("row", "joint"):
            sharded = {
                **odd_settings(block_dirs)[name],
                **few,
                "deepspeed": ZERO3,
                "output_dir": runs / f"zero3_{name}",
            }
            commands.append(["train", str(CONFIG), *settings(model_dir, data_dir, **sharded)])
    (runs / "pairs.py").write_text(PAIR_DRIVER)
    path = os.pathsep.join([environment["PYTHONPATH"], str(DEEPSPEED)])
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "pairs.py",
         json.dumps(commands)],
        env={**environment, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"},
        cwd=runs, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return runs


def assert_equal_runs(together: Path, alone: Path) -> None:
    for key in ("step", "loss", "grad_norm", "conditioned_share"):
        want, got = ([line[key] for line in train_lines(folder)] for folder in (alone, together))
        assert got == pytest.approx(want, rel=1e-4), key
    assert eval_losses(together) == pytest.approx(eval_losses(alone), rel=1e-4)


@pytest.mark.parametrize("name", ["maskable", "row", "padded", "joint"])
def test_two_processes_equal_one_in_every_step_of_an_epoch(pairs, name):
    assert len(train_lines(pairs / f"odd_{name}")) == 6  # 8, 8 and 5 of 21 rows, twice
    assert_equal_runs(pairs / f"pair_{name}", pairs / f"odd_{name}")


def test_a_resumed_run_of_two_processes_ends_bit_identical(pairs):
    full, resumed = (load_file(pairs / name / "model.safetensors") for name in ("pair_row", "pair_resumed"))
    assert all(torch.equal(full[name], resumed[name]) for name in full)
    assert [line["loss"] for line in train_lines(pairs / "pair_resumed")] == [
        line["loss"] for line in train_lines(pairs / "pair_row")[4:]
    ]


def test_weights_sharded_over_processes_train_as_one_process_does(pairs):
    if not DEEPSPEED.is_dir():
        pytest.skip(f"no DeepSpeed in {DEEPSPEED}: test.sh installs it")
    for name in ("row", "joint"):
        assert_equal_runs(pairs / f"zero3_{name}", pairs / f"odd_{name}")


def test_the_conditioned_share_follows_optimizer_steps(pairs):
    for name in ("odd_row", "pair_row"):
        shares = [line["conditioned_share"] for line in train_lines(pairs / name)]
        assert shares == pytest.approx([step / 3 / 1.5 for step in range(5)] + [1.0])


def test_several_processes_are_started_with_the_same_command(model_dir, data_dir, tmp_path, monkeypatch):
    class Started(Exception):
        """In the place of this process."""

    def start(program, command):
        raise Started(program, *command)

    monkeypatch.setattr("coda_posttrain.__main__.os.execv", start)
    for name, value in (("FORCE_TORCHRUN", "1"), ("NPROC_PER_NODE", "2"), ("MASTER_PORT", "29555")):
        monkeypatch.setenv(name, value)
    argv = [str(CONFIG), *settings(model_dir, data_dir, output_dir=tmp_path)]
    with pytest.raises(Started) as started:
        main(["train", *argv])
    program, *command = started.value.args
    assert command[:4] == [program, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    assert f"--log-dir={os.devnull}" in command  # else a folder is left in TMPDIR
    assert command[-len(argv) - 3 :] == ["-m", "coda_posttrain", "train", *argv]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_orthogonalizes_on_a_cpu_as_llama_factory_does_and_in_float32(shape):
    from coda_posttrain.trainer import muon, orthogonalize

    theirs, gradient = muon.zeropower_via_newtonschulz5, torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours = orthogonalize(theirs, gradient, 5)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs(gradient, 5).float(), atol=0.03, rtol=0.0)
    values = torch.linalg.svdvals(ours)
    assert 0.6 < values.min() <= values.max() < 1.3


def test_a_folder_that_another_run_writes_to_is_refused_and_left_alone(tmp_path):
    from coda_posttrain.trainer import run_training

    host = {"output_dir": str(tmp_path), "model_name_or_path": "m", "disable_tqdm": False}
    with claimed(tmp_path), pytest.raises(UserError, match="another run writes to"):
        run_training(host, DiffusionArguments(), {}, {"model": "m"})
    assert not list(tmp_path.iterdir())
