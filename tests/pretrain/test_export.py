"""Checkpoint to safetensors, and weights back into a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from coda_pretrain.__main__ import main as pretrain
from coda_pretrain.checkpoints.export import main, read_weights
from coda_pretrain.config import RunConfig
from coda_pretrain.plain_data import from_dict, merge
from coda_pretrain.train.trainer import Trainer
from CoDALanguageModel import CoDALanguageModel


@pytest.fixture
def finished(run_config):
    trainer = Trainer(from_dict(RunConfig, merge(run_config, {"checkpoint": {"every": 3}})))
    trainer.train()
    trainer.close()
    return trainer


def arguments(source, target, *more):
    return ["--checkpoint_dir", str(source), "--output_dir", str(target), *more]


def test_the_export_holds_the_trained_weights_and_loads(finished, tmp_path, tokenizer_dir):
    target = tmp_path / "export"
    assert main(arguments(finished.output_dir, target)) == 0
    weights = load_file(target / "model.safetensors")
    assert weights.keys() == finished.parameters.keys()
    assert "model.layers.1.self_attn.q_norm.weight" in weights
    for name, weight in weights.items():
        assert torch.equal(weight, finished.parameters[name])
    model = CoDALanguageModel.from_pretrained(target)
    assert model.config.mask_token_id == AutoTokenizer.from_pretrained(target).mask_token_id
    assert json.loads((target / "config.json").read_text())["auto_map"]["AutoConfig"]
    assert len({path.stat().st_mode for path in target.iterdir()}) == 1  # whoever reads one of the files reads all
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".export")] == []


def test_a_finished_run_exports_itself(run_config, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run_config))
    command = ["--config", str(config), "--export_dir", str(tmp_path / "with_the_run")]
    assert pretrain(command) == 0
    assert main(arguments(run_config["output_dir"], tmp_path / "afterwards")) == 0
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("with_the_run", "afterwards")]
    assert names[0] == names[1]
    for name in names[0]:
        assert (tmp_path / "with_the_run" / name).read_bytes() == (tmp_path / "afterwards" / name).read_bytes()
    assert pretrain(command) == 2  # before anything is trained


def test_a_step_can_be_chosen_and_written_in_bf16(finished, tmp_path):
    assert main(arguments(finished.output_dir, tmp_path / "a", "--step", "3", "--dtype", "bfloat16")) == 0
    weights = load_file(tmp_path / "a" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert not torch.equal(weights["lm_head.weight"].float(), finished.parameters["lm_head.weight"])
    assert main(arguments(finished.checkpoints / "step-00000003", tmp_path / "b", "--dtype", "bfloat16")) == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "step-"), (70000.0, "--dtype float16 ends at 6.55e+04")])
def test_weights_that_are_not_finite_are_not_exported(value, words, finished, tmp_path, capsys, monkeypatch):
    def diverged(checkpoint, kind):
        weights = read_weights(checkpoint, kind)
        weights["lm_head.weight"][0, 0] = value
        return weights

    monkeypatch.setattr("coda_pretrain.checkpoints.export.read_weights", diverged)
    assert main(arguments(finished.output_dir, tmp_path / "made", "--dtype", "float16")) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "weights are not finite: lm_head.weight" in error
    assert not [file for file in tmp_path.iterdir() if "made" in file.name]


def test_tied_weights_are_exported_once_and_stay_tied(run_config, tmp_path):
    config = merge(run_config, {"model": {"config": {"tie_word_embeddings": True}}, "max_steps": 3})
    trainer = Trainer(from_dict(RunConfig, config))
    trainer.train()
    trainer.close()
    assert main(arguments(trainer.output_dir, tmp_path / "export")) == 0
    assert "lm_head.weight" not in load_file(tmp_path / "export" / "model.safetensors")
    model = CoDALanguageModel.from_pretrained(tmp_path / "export")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, trainer.parameters["model.embed_tokens.weight"])


def test_an_export_starts_another_run(finished, run_config, tmp_path):
    assert main(arguments(finished.output_dir, tmp_path / "export")) == 0
    model = {"init_from": str(tmp_path / "export"), "config": None}
    second = Trainer(from_dict(RunConfig, merge(run_config, {"model": model, "output_dir": str(tmp_path / "mid")})))
    for name, parameter in second.parameters.items():
        assert torch.equal(parameter, finished.parameters[name])
    assert second.state.step == 0
    second.close()


def test_bad_input_is_named(finished, tmp_path, capsys):
    def message(*command):
        assert main(arguments(*command)) == 2
        return capsys.readouterr().err.splitlines()[-1]

    run = finished.output_dir
    assert "no folder at" in message(tmp_path / "nowhere", tmp_path / "e")
    assert "holds no finished checkpoint" in message(tmp_path, tmp_path / "e")
    assert "--step 4 is not in" in message(run, tmp_path / "e", "--step", "4")
    assert "it has 3, 6" in message(run, tmp_path / "e", "--step", "4")
    assert "exists and is not empty" in message(run, run)
    assert "name it with --tokenizer" in message(run, tmp_path / "e", "--tokenizer", "gone")
    tensors = finished.checkpoints / "step-00000006" / "tensors" / "__0_0.distcp"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert "step-00000006 is corrupt" in message(run, tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_the_export_imports_no_torch_xla():
    code = "import sys; sys.modules['torch_xla'] = None; import coda_pretrain.checkpoints.export"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.cwd())
    assert result.returncode == 0, result.stderr


def test_averages_are_exported_by_name_and_refused_where_there_are_none(finished, run_config, tmp_path, capsys):
    config = {"output_dir": str(tmp_path / "averaged"), "optimizer": {"ema_decay": 0.5}}
    trainer = Trainer(from_dict(RunConfig, merge(run_config, config)))
    trainer.train()
    trainer.close()
    assert main(arguments(trainer.output_dir, tmp_path / "export", "--weights", "ema")) == 0
    weights = load_file(tmp_path / "export" / "model.safetensors")
    assert weights.keys() == trainer.parameters.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, trainer.optimizer.state[trainer.parameters[name]]["ema"])
        assert not torch.equal(weight, trainer.parameters[name])
    assert main(arguments(finished.output_dir, tmp_path / "none", "--weights", "ema")) == 2
    assert "a run with optimizer.ema_decay keeps averages" in capsys.readouterr().err
