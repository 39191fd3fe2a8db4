"""The loop: what a step does, what a restart does, what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from coda_pretrain.__main__ import main
from coda_pretrain.checkpoints.checkpoint import committed_checkpoints
from coda_pretrain.checkpoints.resume_check import check_same_model, check_same_run
from coda_pretrain.config import RunConfig
from coda_pretrain.plain_data import from_dict, merge, to_plain
from coda_pretrain.train.trainer import Trainer, TrainingDiverged
from coda_pretrain.watch.metrics import read_rows
from CoDALanguageModel.errors import INTERRUPTED, UserError
from CoDALanguageModel.run_files import claimed


def trained(config):
    trainer = Trainer(from_dict(RunConfig, config))
    trainer.train()
    trainer.close()
    return trainer


def rows_of(config):
    return read_rows(Path(config["output_dir"]) / "metrics.jsonl")


def losses_of(config):
    return {row["step"]: row["loss"] for row in rows_of(config) if "loss" in row}


def weights_of(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}


def assert_same_weights(first, second, **tolerance):
    for name, weight in weights_of(first).items():
        torch.testing.assert_close(weights_of(second)[name], weight, **tolerance)


def at(folder, config, **changes):
    return merge({**config, "output_dir": str(folder)}, changes)


def test_a_run_learns_and_reports_each_step(tmp_path, run_config):
    config = at(tmp_path / "a", run_config, max_steps=30)
    trained(config)
    rows = rows_of(config)
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert sum(row["loss"] for row in rows[-5:]) < 0.75 * sum(row["loss"] for row in rows[:5])
    assert rows[0]["learning_rate"] == 0.005
    assert rows[-1]["tokens"] == 30 * 8 * 32
    assert 0 < rows[-1]["masked_share"] < 1
    assert rows[-1]["prefix_probability"] == rows[-1]["span_probability"] == 0.25
    assert rows[-1]["grad_norm"] > 0
    assert rows[-1]["tokens_per_s"] > 0


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_resumed_run_has_bit_equal_losses_and_weights(tmp_path, run_config, optimizer):
    config = merge(run_config, {"optimizer": {"name": optimizer}})
    whole = trained(at(tmp_path / "whole", config))
    interrupted = at(tmp_path / "parts", config, checkpoint={"every": 3})
    first = Trainer(from_dict(RunConfig, interrupted))
    original = first._step

    def killed_after_four(reporter):
        if first.state.step == 4:
            raise KeyboardInterrupt
        return original(reporter)

    first._step = killed_after_four
    with pytest.raises(KeyboardInterrupt):
        first.train()
    first.close()
    assert list(losses_of(interrupted)) == [1, 2, 3, 4]
    second = trained(interrupted)
    assert losses_of(interrupted) == losses_of(at(tmp_path / "whole", config))
    assert_same_weights(whole, second, rtol=0, atol=0)


def test_a_second_run_in_a_folder_is_refused_and_the_first_loses_nothing(tmp_path, run_config):
    config = at(tmp_path / "a", run_config, max_steps=2)
    second = Trainer(from_dict(RunConfig, config))
    trained(config)
    with claimed(tmp_path / "a"), pytest.raises(UserError, match="another run writes to"):
        second.train()
    second.close()
    assert list(losses_of(config)) == [1, 2]


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_ends_cleanly(tmp_path, run_config, number, caplog):
    config = at(tmp_path / "a", run_config)
    trainer = Trainer(from_dict(RunConfig, config))
    original = trainer._step

    def stopped_in_second_step(reporter):
        if trainer.state.step == 1:
            os.kill(os.getpid(), number)
        return original(reporter)

    before = signal.getsignal(number)
    trainer._step = stopped_in_second_step
    trainer.train()
    trainer.close()
    assert trainer.stopped_by == number
    assert f"{number.name}: stopped after step 2 of 6" in caplog.text
    assert [path.name for path in committed_checkpoints(trainer.checkpoints)] == ["step-00000002"]
    assert signal.getsignal(number) == before
    trained(config)
    trained(at(tmp_path / "whole", run_config))
    assert losses_of(config) == losses_of(at(tmp_path / "whole", run_config))


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, INTERRUPTED)])
def test_a_command_that_ctrl_c_ended_is_not_followed_by_the_next_one(tmp_path, run_config, monkeypatch, number, status):
    config = at(tmp_path / "a", run_config)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    original = Trainer._step

    def stopped(trainer, reporter):
        os.kill(os.getpid(), number)
        return original(trainer, reporter)

    monkeypatch.setattr(Trainer, "_step", stopped)
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == status
    assert list(losses_of(config)) == [1]


def signal_at_part(trainer, number):
    """Send SIGTERM while part `number` of all parts that go through the model, from 1, is computed."""
    original, count = trainer.functions._accumulate, iter(range(1, 1000))

    def accumulate(part):
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(part)

    trainer.functions._accumulate = accumulate


@pytest.mark.parametrize(
    ("part", "saved"),
    [(2, []), (5, [1]), (8, [2]), (9, [2])],
    ids=["in the first step", "with the step before saved anew", "in the last part of a step", "right after a save"],
)
def test_sigterm_between_parts_gives_the_step_up_and_saves_the_one_before(tmp_path, run_config, part, saved, caplog):
    config = at(tmp_path / "a", run_config, micro_batch_size=2, checkpoint={"every": 2})
    trainer = Trainer(from_dict(RunConfig, config))
    signal_at_part(trainer, part)
    trainer.train()
    trainer.close()
    assert [path.name for path in committed_checkpoints(trainer.checkpoints)] == [f"step-{n:08d}" for n in saved]
    assert f"stopped after step {saved[-1] if saved else 0} of 6" in caplog.text
    assert ("is given up between two of its 4 parts" in caplog.text) == (part % 4 != 0)
    trained(config)
    trained(at(tmp_path / "whole", run_config, micro_batch_size=2))
    assert losses_of(config) == losses_of(at(tmp_path / "whole", run_config))


def test_sigterm_in_an_evaluation_gives_it_up_and_saves_the_step(tmp_path, run_config, shards_dir):
    held_out = {"every": 2, "batches": 3, "data": {"sources": [{"path": str(shards_dir / "validation")}]}}
    config = at(tmp_path / "a", run_config, evaluation=held_out)
    trainer = Trainer(from_dict(RunConfig, config))
    original, batches = trainer.functions.loss, []

    def loss(parts):
        batches.append(parts)
        os.kill(os.getpid(), signal.SIGTERM)
        return original(parts)

    trainer.functions.loss = loss
    trainer.train()
    trainer.close()
    assert len(batches) == 1
    assert [path.name for path in committed_checkpoints(trainer.checkpoints)] == ["step-00000002"]
    assert not any("eval_loss" in row for row in rows_of(config))


def test_the_last_step_is_always_saved_and_a_finished_run_does_nothing(tmp_path, run_config):
    config = at(tmp_path / "a", run_config, checkpoint={"every": 4})
    trainer = trained(config)
    assert [path.name for path in committed_checkpoints(trainer.checkpoints)] == ["step-00000004", "step-00000006"]
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    again = trained(config)
    assert again.state.step == 6
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before


def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path, run_config):
    whole = trained(at(tmp_path / "1x8", run_config))
    parts = trained(at(tmp_path / "8x1", run_config, micro_batch_size=1))
    first, second = losses_of(at(tmp_path / "1x8", run_config)), losses_of(at(tmp_path / "8x1", run_config))
    assert list(second.values()) == pytest.approx(list(first.values()), abs=1e-5)
    # AdamW makes much of rounding where a gradient is nearly zero, and how sums round differs between processors; one
    # step moves a weight by 1e-2.
    assert_same_weights(whole, parts, rtol=0, atol=2e-4)


def test_evaluation_noise_is_the_same_each_time_and_does_not_touch_training(tmp_path, run_config, shards_dir):
    held_out = {"every": 2, "batches": 2, "data": {"sources": [{"path": str(shards_dir / "validation")}]}}
    with_evaluation = at(tmp_path / "a", run_config, evaluation=held_out, optimizer={"learning_rate": 1e-30})
    trainer = trained(with_evaluation)
    evaluated = {row["step"]: row["eval_loss"] for row in rows_of(with_evaluation) if "eval_loss" in row}
    assert list(evaluated) == [2, 4, 6]
    assert len(set(evaluated.values())) == 1  # the weights do not move, so neither does the loss
    for key, array in trainer.evaluation.batch(0).items():
        assert (array == trainer.evaluation.batch(0)[key]).all()
    without = trained(at(tmp_path / "b", run_config, optimizer={"learning_rate": 1e-30}))
    assert losses_of(with_evaluation) == losses_of({"output_dir": without.config.output_dir})


def spoil(trainer, steps):
    """Make the loss of some steps infinite."""
    original = trainer.batches.get

    def get(step):
        batch = original(step)
        return {**batch, "loss_weights": batch["loss_weights"] * np.inf} if step in steps else batch

    trainer.batches.get = get


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, run_config):
    config = at(tmp_path / "a", run_config)
    trainer = Trainer(from_dict(RunConfig, config))
    spoil(trainer, {2})
    weights = []
    original = trainer.functions.step

    def noted(parts, **numbers):
        result = original(parts, **numbers)
        weights.append(weights_of(trainer))
        return result

    trainer.functions.step = noted
    trainer.train()
    trainer.close()
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(weights, weights[1:], strict=False)]
    assert same == [False, True, False, False, False]
    assert (trainer.state.skipped_steps, trainer.state.optimizer_steps) == (1, 5)
    assert rows_of(config)[-1]["skipped_steps"] == 1


def test_too_many_skipped_steps_end_the_run(run_config):
    trainer = Trainer(from_dict(RunConfig, {**run_config, "max_skipped_steps": 2}))
    spoil(trainer, {0, 1})
    with pytest.raises(TrainingDiverged, match="2 steps in a row, up to step 2, had a loss or gradient"):
        trainer.train()
    trainer.close()


def test_training_goes_on_from_an_earlier_checkpoint_and_sets_later_ones_aside(tmp_path, run_config):
    config = at(tmp_path / "a", run_config, checkpoint={"every": 2})
    trainer = trained(config)
    earlier = trainer.checkpoints / "step-00000002"
    expected = losses_of(config)
    trained(merge(config, {"checkpoint": {"resume": str(earlier)}, "max_steps": 5}))
    assert [path.name for path in committed_checkpoints(trainer.checkpoints)][-1] == "step-00000005"
    assert (trainer.checkpoints / "step-00000006.abandoned").is_dir()
    assert [row["step"] for row in rows_of(config)] == [1, 2, 3, 4, 5]
    assert losses_of(config)[3] == expected[3]


def test_bf16_trains_close_to_fp32_with_float32_weights(tmp_path, run_config):
    full = trained(at(tmp_path / "fp32", run_config))
    half = trained(at(tmp_path / "bf16", run_config, hardware={"precision": "bf16"}))
    assert all(p.dtype == torch.float32 for p in half.parameters.values())
    values = [losses_of({"output_dir": t.config.output_dir}) for t in (full, half)]
    assert values[0] != values[1]
    assert list(values[1].values()) == pytest.approx(list(values[0].values()), rel=0.02)


def test_remat_changes_no_loss(tmp_path, run_config):
    plain, remat = at(tmp_path / "plain", run_config), at(tmp_path / "remat", run_config, hardware={"remat": True})
    trained(plain)
    trained(remat)
    assert list(losses_of(remat).values()) == pytest.approx(list(losses_of(plain).values()), abs=1e-5)


def test_epochs_become_steps(run_config):
    del run_config["max_steps"]
    trainer = Trainer(from_dict(RunConfig, {**run_config, "num_epochs": 1.5}))
    trainer.close()
    samples = trainer.batches._mixture.num_samples
    assert trainer.num_steps == int(1.5 * samples / 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, r"seed is 4, but the run in .*step-00000006 was made with 3"),
        ({"global_batch_size": 4}, r"global_batch_size is 4, but"),
        ({"model": {"config": {"hidden_size": 64}}}, r"model\.config\.hidden_size is 64, but"),
    ],
)
def test_a_resume_with_other_data_or_shapes_is_refused(tmp_path, run_config, change, message):
    config = at(tmp_path / "a", run_config)
    trained(config)
    with pytest.raises(ValueError, match=message):
        Trainer(from_dict(RunConfig, merge(merge(config, change), {"max_steps": 8})))


def test_a_resume_with_another_objective_or_attention_is_refused_by_its_setting(tmp_path, run_config):
    start = {"objective": "block", "model": {"config": None, "init_from": "x", "attention": "block_causal"}}
    config = merge(merge(run_config, start), {"model": {"block_size": 8}})
    settings = to_plain(from_dict(RunConfig, config))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    check_same_run(from_dict(RunConfig, config), tmp_path)
    for change, message in (
        ({"objective": "joint", "blocks": {"autoregressive_weight": 1.0}}, "objective is 'joint', but .* with 'block'"),
        ({"model": {"block_size": 16}}, "model.block_size is 16, but .* with 8; set it back, or start a new run"),
        ({"model": {"block_origin": "answer"}}, "model.block_origin is 'answer', but .* with None"),
    ):
        with pytest.raises(UserError, match=message):
            check_same_run(from_dict(RunConfig, merge(config, change)), tmp_path)
    del settings["objective"]  # as in runs of before there were others
    settings["model"] |= {"attention": None, "block_size": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    masked = {"objective": "masked", "model": {"attention": None, "block_size": None}}
    check_same_run(from_dict(RunConfig, merge(config, masked)), tmp_path)


def test_a_resume_on_other_shards_is_refused_unless_accepted_and_then_recorded(
    tmp_path, run_config, write_shards, shards_dir, caplog
):
    def shards(name, first, count):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        write_shards(tmp_path / name, [[first + i % 90, 7, 9] * 8 for i in range(count)], documents_per_shard=20)
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        manifest["tokenizer"] = json.loads((shards_dir / "manifest.json").read_text())["tokenizer"]
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))

    for name in ("one", "two", "held"):
        shards(name, 10, 60)
    settings = {
        "data": {"root": str(tmp_path), "sources": [{"path": "one"}, {"path": "two"}]},
        "evaluation": {"every": 2, "batches": 1, "data": {"root": str(tmp_path), "sources": [{"path": "held"}]}},
    }
    config = merge(at(tmp_path / "a", run_config), settings) | {"max_steps": 3}
    trained(config)
    config["max_steps"] = 4

    def refused(*parts):
        with pytest.raises(ValueError, match="are not those that the run in .*step-0000000[34] has read") as raised:
            Trainer(from_dict(RunConfig, config))
        assert all(part in str(raised.value) for part in (*parts, "--accept_changed_data")), raised.value

    for name in ("one", "two"):
        shutil.copytree(tmp_path / name, tmp_path / "moved" / name)
    elsewhere = merge(config, {"data": {"root": str(tmp_path / "moved")}})
    Trainer(from_dict(RunConfig, elsewhere)).close()  # the same content
    shards("two", 10, 61)
    refused("data two: 60 documents before, 61 now, 1500 tokens before, 1525 now")
    shards("two", 11, 60)
    refused("data two: as long as before (1500 tokens), with other content")
    shards("held", 12, 60)
    refused("data two:", "evaluation.data held:")
    trainer = Trainer(from_dict(RunConfig, config), accept_changed_data=True)
    assert "goes on from step 3 with other token shards: data two: as long" in caplog.text
    trainer.train()
    trainer.close()
    record = json.loads((trainer.checkpoints / "step-00000004" / "data.json").read_text())
    accepted = [(change["step"], change["source"]) for change in record["accepted_changes"]]
    assert accepted == [(3, "data two"), (3, "evaluation.data held")]
    config["max_steps"] = 6
    Trainer(from_dict(RunConfig, config)).close()  # what was accepted once is what the run reads
    shards("one", 13, 60)
    refused("data one:")


def test_a_byte_edited_in_a_shard_is_found_by_who_asks_for_it(tmp_path, run_config, shards_dir):
    shutil.copytree(shards_dir, tmp_path / "shards")
    config = merge(run_config, {"max_steps": 2, "data": {"sources": [{"path": str(tmp_path / "shards")}]}})
    trained(config)
    asked = merge(config, {"max_steps": 3, "data": {"verify": True}})
    trained(asked)
    shard = tmp_path / "shards" / "train-000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\x01\x00")
    with pytest.raises(ValueError, match="shard train-000000 in .* does not have the hash its manifest recorded"):
        Trainer(from_dict(RunConfig, merge(asked, {"max_steps": 4})))


def test_a_checkpoint_that_does_not_say_what_it_read_is_continued_with_a_warning(tmp_path, run_config, caplog):
    config = at(tmp_path / "a", run_config)
    newest = committed_checkpoints(trained(config).checkpoints)[-1]
    marker = json.loads((newest / "COMMITTED.json").read_text())
    del marker["files"]["data.json"]
    (newest / "COMMITTED.json").write_text(json.dumps(marker))
    (newest / "data.json").unlink()
    trainer = trained({**config, "max_steps": 7})
    assert "step-00000006 does not say which shards it was trained on" in caplog.text
    record = json.loads((trainer.checkpoints / "step-00000007" / "data.json").read_text())
    assert list(record["sources"]["data"]) == [source["path"] for source in config["data"]["sources"]]


def test_a_resume_with_another_model_configuration_is_refused(tmp_path, run_config):
    config = at(tmp_path / "a", run_config)
    newest = committed_checkpoints(trained(config).checkpoints)[-1]
    current = json.loads((newest / "model_config.json").read_text())
    check_same_model(current | {"transformers_version": "another", "eos_token_id": 7, "a_new_key": 1}, newest)
    message = r"the model's mask_token_id is 5, but the run in .*step-00000006 was made with"
    with pytest.raises(ValueError, match=message):
        check_same_model(current | {"mask_token_id": 5}, newest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 128}, "seq_len must be at most the model's max_position_embeddings 64, got 128"),
        ({"max_steps": 1}, "schedule.warmup_steps must be at most the 1 steps of the run, got 2"),
        ({"hardware": {"mesh": {"fsdp": 2}}}, r"hardware.mesh \(data, fsdp, tensor\) = \(1, 2, 1\) needs 2 devices"),
        ({"model": {"config": {"hiden_size": 32}}}, "unknown key model.config.hiden_size"),
        ({"model": {"tokenizer": "nowhere"}}, "model.tokenizer: no folder at 'nowhere'"),
        ({"data": {"sources": [{"path": "nowhere"}]}}, "nowhere"),
        ({"max_steps": None, "num_epochs": 0.001}, "is less than one step of global_batch_size 8"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused_before_training(run_config, change, message):
    with pytest.raises(ValueError, match=message):
        Trainer(from_dict(RunConfig, merge(run_config, change)))


def test_a_batch_that_the_mesh_cannot_split_is_refused():
    from coda_pretrain.devices.config import HardwareConfig
    from coda_pretrain.devices.torch_backend import TorchBackend

    backend = TorchBackend(HardwareConfig())
    backend.mesh_shape = (2, 3, 1)
    message = r"global_batch_size must be a multiple of the 6 devices .* data 2 x fsdp 3\), got 8"
    with pytest.raises(ValueError, match=message):
        backend.check_rows("global_batch_size", 8)


def test_shards_of_another_tokenizer_are_refused_or_warned_about(tmp_path, run_config, shards_dir, caplog):
    def with_manifest(name, **facts):
        shutil.copytree(shards_dir, tmp_path / name)
        manifest = json.loads((shards_dir / "manifest.json").read_text())
        manifest["tokenizer"] |= facts
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
        return from_dict(RunConfig, merge(run_config, {"data": {"sources": [{"path": str(tmp_path / name)}]}}))

    with pytest.raises(ValueError, match="a tokenizer of 1000 ids, more than the model's vocab_size 320"):
        Trainer(with_manifest("large", vocab_size=1000))
    Trainer(with_manifest("other", fingerprint="other")).close()
    assert "made with another tokenizer than model.tokenizer" in caplog.text
    caplog.clear()
    Trainer(with_manifest("same")).close()
    assert "another tokenizer" not in caplog.text


def test_command_line_reports_bad_input_in_one_line_and_dry_run_prints_yaml(tmp_path, run_config):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_config))
    command = [sys.executable, "-m", "coda_pretrain", "--config", str(path)]
    dry = subprocess.run([*command, "--dry_run", "optimizer.learning_rate=3e-4"], capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    assert yaml.safe_load(dry.stdout)["optimizer"]["learning_rate"] == 3e-4
    assert not Path(run_config["output_dir"]).exists()
    wrong = subprocess.run([*command, "optimizer.learning_rat=1"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith(
        "coda_pretrain: error: unknown key optimizer.learning_rat; did you mean 'learning_rate'?"
    )


def test_metrics_rows_are_json_objects_with_the_promised_keys(tmp_path, run_config):
    config = at(tmp_path / "a", run_config, max_steps=2)
    trained(config)
    row = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "learning_rate", "tokens", "tokens_per_s", "time_s", "grad_norm"} <= row.keys()
