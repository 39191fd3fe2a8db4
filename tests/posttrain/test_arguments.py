"""Settings are wrong only loudly, before anything heavy is imported."""

import json
from pathlib import Path

import pytest
import yaml

from coda_posttrain.__main__ import main
from coda_posttrain.arguments import (
    INCOMPATIBLE,
    DiffusionArguments,
    check_datasets,
    check_export,
    check_host_keys,
    check_model_folder,
    load_config,
    parse_diffusion,
    split_config,
)
from CoDALanguageModel.errors import UserError

REPO = Path(__file__).resolve().parents[2]
EXAMPLES = REPO / "post-train/LLaMA-Factory/examples"


def test_unknown_diffusion_key_names_the_nearest_known_one():
    with pytest.raises(ValueError, match="unknown key diffusion.span_probabilty; did you mean 'diffusion.span_prob"):
        parse_diffusion({"span_probabilty": 0.5})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("t_min", 0.0),
        ("t_min", [0.1, 1.0]),
        ("t_min", []),
        ("t_min", "small"),
        ("span_probability", 25),
        ("span_lengths", [0]),
        ("span_lengths", [2.5]),
        ("prompt_annealing_epochs", -1),
        ("tail", "end"),
        ("tail_tokens", 1.5),
        ("normalize", "tokens"),
        ("overlong", True),
        ("objective", "blocks"),
        ("complementary", 1),
        ("autoregressive_weight", 0.5),
        ("eval_seed", -1),
    ],
)
def test_bad_value_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"diffusion.{key} must be .*got"):
        parse_diffusion({key: value})


def test_levels_of_complementary_masks_and_the_autoregressive_weight_are_bounded():
    with pytest.raises(ValueError, match=r"diffusion.t_min must be below 0.5 .* got 0.5"):
        parse_diffusion({"objective": "block", "complementary": True, "t_min": [0.1, 0.5]})
    with pytest.raises(ValueError, match="diffusion.autoregressive_weight must be a finite number > 0, got .inf"):
        parse_diffusion({"objective": "joint", "autoregressive_weight": float("inf")})


def test_scalars_and_lists_mean_the_same():
    assert parse_diffusion({"t_min": 0.1, "span_lengths": 4}) == parse_diffusion({"t_min": [0.1], "span_lengths": [4]})


def test_overrides_reach_into_the_section(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("learning_rate: 1.0e-5\ndiffusion:\n  tail: pad\n")
    config = load_config(str(file), ["diffusion.t_min=[0.01,0.2]", "diffusion.tail_tokens=7", "learning_rate=2e-5"])
    host, diffusion = split_config(config)
    assert diffusion == DiffusionArguments(tail="pad", t_min=(0.01, 0.2), tail_tokens=7)
    assert host["learning_rate"] == 2e-5
    assert host["stage"] == "sft"
    assert "diffusion" not in host


@pytest.mark.parametrize("key", INCOMPATIBLE)
def test_incompatible_settings_are_refused_with_the_reason(key):
    with pytest.raises(ValueError, match=f"{key}=True is not supported for masked diffusion: .{{20,}}"):
        split_config({key: True})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stage": "dpo"}, "stage must be sft, got 'dpo'"),
        ({"ignore_pad_token_for_loss": False}, "set diffusion.tail=pad"),
        ({"t_min": 0.1}, "write diffusion.t_min"),
        ({"diffusion": 3}, "must be a section"),
    ],
)
def test_what_would_change_the_objective_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        split_config(config)


def test_environment_that_switches_checks_off_is_refused(monkeypatch):
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    with pytest.raises(ValueError, match="unset the environment variable ALLOW_EXTRA_ARGS"):
        split_config({})


def test_bare_no_is_read_as_the_strategy():
    assert split_config({"save_strategy": False})[0]["save_strategy"] == "no"


def test_configuration_files_are_checked(tmp_path):
    for name, text in (("broken.yaml", "a: [1"), ("list.yaml", "- 1\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            load_config(str(tmp_path / name))
    with pytest.raises(ValueError, match="not found"):
        load_config(str(tmp_path / "absent.yaml"))
    (tmp_path / "good.yaml").write_text("a: 1\n")
    with pytest.raises(ValueError, match="key=value, got '--lr'"):
        load_config(str(tmp_path / "good.yaml"), ["--lr"])


def test_missing_model_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="folder not found: .*absent"):
        check_model_folder({"model_name_or_path": str(tmp_path / "absent")})
    with pytest.raises(ValueError, match="no config.json in"):
        check_model_folder({"model_name_or_path": str(tmp_path)})
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ValueError, match="is a 'qwen3' model.*save_hf_model.py"):
        check_model_folder({"model_name_or_path": str(tmp_path)})


def test_dataset_errors_name_file_and_key(tmp_path):
    host = {"dataset": "tain", "dataset_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="dataset_info.json not found"):
        check_datasets(host)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"train": {"file_name": "train.jsonl"}}))
    with pytest.raises(ValueError, match="dataset: 'tain' is not in .*did you mean 'train'"):
        check_datasets(host)
    (tmp_path / "train.jsonl").write_text('{"instruction": "a", "input": "", "output": "b"}\n')
    with pytest.raises(ValueError, match="eval_dataset: 'dev' is not in"):
        check_datasets({**host, "dataset": "train", "eval_dataset": "dev"})
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="'train': .*is empty"):
        check_datasets({**host, "dataset": "train"})
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "output": "b"}\n')
    with pytest.raises(ValueError, match="train.jsonl:1: no key 'instruction' .it has 'prompt', 'output'"):
        check_datasets({**host, "dataset": "train"})
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(ValueError, match="file not found"):
        check_datasets({**host, "dataset": "train"})


def test_command_line_reports_settings_briefly(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("model_name_or_path: m\ndiffusion:\n  tial: eos\n")
    assert main(["train", str(tmp_path / "x.yaml")]) == 2
    assert "error: unknown key diffusion.tial; did you mean 'diffusion.tail'?" in capsys.readouterr().err
    assert main(["get", "model_name_or_path", str(tmp_path / "x.yaml")]) == 0
    assert capsys.readouterr().out == "m\n"
    assert main(["fly"]) == 2


def test_recipes_are_the_published_ones():
    stages = [yaml.safe_load((EXAMPLES / f"train_full/coda_sft_stage{n}.yaml").read_text()) for n in (1, 2)]
    for stage in stages:
        host, diffusion = split_config(stage)
        assert host["per_device_train_batch_size"] * 8 * host["gradient_accumulation_steps"] == 176
        assert (host["cutoff_len"], host["num_train_epochs"], host["learning_rate"]) == (1024, 10, 2e-5)
        assert (host["lr_scheduler_type"], host["warmup_steps"], host["optim"]) == ("cosine", 0.1, "adamw_torch")
        assert host["early_stopping_steps"] > 0
        assert diffusion.t_min == (0.001, 0.25, 0.5, 0.25, 0.001)
        assert diffusion.span_probability == (0.25, 0.5, 0.5, 0.75, 0.25)
        assert diffusion.span_lengths == (4, 8, 16, 32)
        assert (diffusion.tail, diffusion.normalize) == ("pad", "padded")
        check_datasets(host)
    assert [split_config(stage)[1].prompt_annealing_epochs for stage in stages] == [1.0, 0.0]
    assert "filtered_infinity" in stages[0]["dataset"]
    assert "educational" in stages[1]["dataset"]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("train_*/*.yaml")), ids=lambda file: file.stem)
def test_every_example_parses(file):
    split_config(load_config(str(file)))


def test_host_keys_that_nobody_knows_are_refused_before_any_import(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("model_name_or_path: m\nlearning_rat: 1\n")
    assert main(["train", str(tmp_path / "x.yaml")]) == 2
    assert "unknown key 'learning_rat': LLaMA-Factory has no such setting; did you mean" in capsys.readouterr().err
    check_host_keys(
        split_config({"learning_rate": 1, "lora_rank": 8, "cutoff_len": 9, "overwrite_output_dir": True})[0]
    )


@pytest.mark.parametrize("value", ["a,b", "[x]/o'neil", '{q}"', "40000", "run #1: x", "${home}", "~", "a=b", " s "])
def test_paths_on_the_command_line_are_text(tmp_path, value):
    (tmp_path / "x.yaml").write_text("output_dir: null\n")
    assert load_config(str(tmp_path / "x.yaml"), [f"output_dir={value}"])["output_dir"] == value


def test_a_path_in_a_file_must_be_text():
    with pytest.raises(ValueError, match="output_dir must be text, got 40000; put it in quotes"):
        split_config({"output_dir": 40000})


def test_rows_longer_than_the_models_context_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "CoDA", "max_position_embeddings": 512}')
    host, masked = {"model_name_or_path": str(tmp_path)}, parse_diffusion(None)
    check_model_folder({**host, "cutoff_len": 512}, masked)
    check_model_folder(host)  # to be merged or identified alone
    with pytest.raises(ValueError, match="at most the model's max_position_embeddings=512, got 2048"):
        check_model_folder(host, masked)
    with pytest.raises(ValueError, match="cutoff_len must be a whole number >= 1, got 0"):
        check_model_folder({**host, "cutoff_len": 0}, masked)


def test_the_objective_is_one_of_the_models_attention_and_shift(tmp_path):
    host = {"model_name_or_path": str(tmp_path), "cutoff_len": 8}
    cases = {
        '{"model_type": "CoDA"}': {"masked"},
        '{"model_type": "CoDA", "attention": "block_causal", "block_size": 4}': {"block", "joint"},
        '{"model_type": "CoDA", "attention": "block_causal", "block_size": 4, "logits_shift": false}': {"block"},
    }
    for text, allowed in cases.items():
        (tmp_path / "config.json").write_text(text)
        for objective in ("masked", "block", "joint"):
            weight = {"autoregressive_weight": 1} if objective == "joint" else {}
            settings = parse_diffusion({"objective": objective, **weight})
            if objective in allowed:
                check_model_folder(host, settings)
            else:
                with pytest.raises(ValueError, match=rf"must be .*, got '{objective}'; pre-training.*model.attention"):
                    check_model_folder(host, settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "config.json' must hold a JSON object, got list"),
        ("{", "config.json' is not valid JSON"),
        (
            '{"model_type": "CoDA", "max_position_embeddings": "x"}',
            "max_position_embeddings must be an integer, got 'x'",
        ),
        ('{"model_type": "CoDA", "attention": []}', r"attention must be one of full, block_causal, got \[\]"),
        ('{"model_type": "CoDA", "rope_parameters": 3}', "rope_parameters must be an object or null, got 3"),
        ('{"model_type": []}', r"is a \[\] model, not a 'CoDA' one"),
    ],
)
def test_a_configuration_of_the_wrong_kind_is_refused_by_its_field(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"model_name_or_path.*{message}"):
        check_model_folder({"model_name_or_path": str(tmp_path)}, parse_diffusion(None))


def test_an_export_needs_an_adapter_and_a_folder_of_its_own(tmp_path):
    with pytest.raises(ValueError, match="adapter_name_or_path is required: export merges a LoRA adapter"):
        check_export({"export_dir": "x"})
    host = {"model_name_or_path": "m", "adapter_name_or_path": str(tmp_path)}
    with pytest.raises(ValueError, match="no adapter_config.json in"):
        check_export({**host, "export_dir": "x"})
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="export_dir is required"):
        check_export(host)
    with pytest.raises(ValueError, match="is adapter_name_or_path itself"):
        check_export({**host, "export_dir": str(tmp_path)})
    check_export({**host, "export_dir": "x"})


def test_defaults_spare_the_disk_the_log_and_the_first_tokenisation():
    host, _ = split_config({})
    assert host["save_total_limit"] == 2
    assert host["ddp_timeout"] >= 6 * 3600
    assert host["disable_tqdm"] is True  # no terminal here
    assert split_config({"save_total_limit": None})[0]["save_total_limit"] is None
