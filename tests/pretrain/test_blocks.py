"""Training by blocks: settings, batches, the growing block, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from coda_pretrain.checkpoints.export import main as export_main
from coda_pretrain.config import RunConfig
from coda_pretrain.noise.blocks import BlockConfig
from coda_pretrain.plain_data import from_dict, merge
from coda_pretrain.train.trainer import Trainer
from coda_pretrain.watch.metrics import read_rows
from CoDALanguageModel import CoDALanguageModel
from CoDALanguageModel.diffusion import IGNORE_INDEX

BLOCKS = {"attention": "block_causal", "block_size": 4}
BLOCK = {"objective": "block", "model": {"config": BLOCKS}}
JOINT = {"objective": "joint", "model": {"config": BLOCKS}, "blocks": {"autoregressive_weight": 0.5}}


def trained(config):
    trainer = Trainer(from_dict(RunConfig, config))
    trainer.train()
    trainer.close()
    return trainer


def rows_of(config):
    return [row for row in read_rows(Path(config["output_dir"]) / "metrics.jsonl") if "loss" in row]


def batches_of(config):
    """A trainer's batches and its held-out ones, if any."""
    trainer = Trainer(from_dict(RunConfig, config))
    trainer.close()
    return trainer.batches, trainer.evaluation


@pytest.mark.parametrize("objective", [BLOCK, JOINT], ids=["block", "joint"])
def test_a_run_by_blocks_learns_and_exports_who_may_attend_to_whom(tmp_path, run_config, shards_dir, objective):
    held_out = {"every": 30, "batches": 2, "data": {"sources": [{"path": str(shards_dir / "validation")}]}}
    config = merge(merge(run_config, objective), {"max_steps": 30, "evaluation": held_out, "micro_batch_size": 4})
    config["hardware"]["peak_tflops"] = 1.0
    trained(config)
    rows = rows_of(config)
    assert sum(row["loss"] for row in rows[-5:]) < 0.75 * sum(row["loss"] for row in rows[:5])
    assert rows[-1]["block_size"] == 4
    assert rows[-1]["tokens"] == 30 * 8 * 32
    assert 0 < rows[-1]["masked_share"] < 1
    assert rows[-1]["mfu"] > 0
    evaluated = read_rows(Path(config["output_dir"]) / "metrics.jsonl")[-1]
    assert {"eval_loss", "eval_loss_t0.00-0.50", "eval_loss_t0.50-1.00"} <= evaluated.keys()
    export = tmp_path / "export"
    assert export_main(["--checkpoint_dir", config["output_dir"], "--output_dir", str(export)]) == 0
    exported = CoDALanguageModel.from_pretrained(export).config
    assert (exported.attention, exported.block_size, exported.block_origin) == ("block_causal", 4, "text")
    assert exported.causal_context is (objective is JOINT)


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("objective", [BLOCK, JOINT], ids=["block", "joint"])
def test_parts_and_processes_change_nothing_and_shapes_do_not_follow_the_block(run_config, objective, complementary):
    config = merge(merge(run_config, objective), {"blocks": {"complementary": complementary, "growth_steps": 4}})
    batches, _ = batches_of(config)
    made = [batches.make(step) for step in range(6)]
    assert [batches.blocks(step).size for step in range(6)] == [1, 1, 2, 2, 4, 4]
    for batch in made:
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
            name: (array.shape, array.dtype) for name, array in made[0].items()
        }
    rows, width = (16 if complementary else 8), (64 if objective is JOINT else 32)
    assert made[0]["noised_ids"].shape == made[0]["group"].shape == (rows, 64)
    assert made[0]["labels"].shape == made[0]["loss_weights"].shape == (rows, width)
    later = Trainer(from_dict(RunConfig, config))
    later.batches._rows = range(2, 6)  # of another process
    part = later.batches.make(5)
    later.close()
    share = slice(4, 12) if complementary else slice(2, 6)
    for name, array in made[5].items():
        assert np.array_equal(part[name], array[share]), name
    if complementary:
        targets = (made[5]["labels"][:, :32] != IGNORE_INDEX).astype(int)
        once = targets[::2] + targets[1::2]
        assert once.max() == 1
        assert once.sum() > 100


def test_the_loss_does_not_depend_on_parts_and_a_resumed_run_goes_on_at_its_block(tmp_path, run_config):
    config = merge(merge(run_config, JOINT), {"blocks": {"complementary": True, "growth_steps": 4}})
    whole = {**config, "output_dir": str(tmp_path / "whole")}
    trained(whole)
    want = [row["loss"] for row in rows_of(whole)]
    parts = {**config, "output_dir": str(tmp_path / "parts"), "micro_batch_size": 2}
    trained(parts)
    assert [row["loss"] for row in rows_of(parts)] == pytest.approx(want, abs=1e-5)
    resumed = {**config, "output_dir": str(tmp_path / "resumed"), "checkpoint": {"every": 3}}
    trainer = Trainer(from_dict(RunConfig, resumed))
    trainer._step = (lambda step: lambda reporter: step(reporter) or trainer.state.step == 3)(trainer._step)
    trainer.train()
    trainer.close()
    assert len(rows_of(resumed)) == 3
    trained(resumed)
    assert [row["loss"] for row in rows_of(resumed)] == want
    assert [row["block_size"] for row in rows_of(resumed)] == [1, 1, 2, 2, 4, 4]


def test_every_backend_gives_the_same_losses_with_one_compilation_while_the_block_grows(tmp_path, run_config, drive):
    def runs(name, hardware):
        complementary = {"blocks": {"complementary": True, "growth_steps": 4}}
        configs = {
            "block": merge(merge(run_config, BLOCK), {"blocks": {"growth_steps": 4}}),
            "joint": merge(merge(run_config, JOINT), complementary),
        }
        for kind, config in configs.items():
            folder = {"output_dir": str(tmp_path / f"{name}-{kind}")}
            yield {"config": {**config, **folder, **({"hardware": hardware[kind]} if hardware else {})}}

    for run in runs("one", None):
        trained(run["config"])
    drive(list(runs("pair", None)), num_processes=2)
    mesh = {"backend": "xla", "mesh": {"data": 1, "fsdp": 2, "tensor": 2}}
    hardware = {"block": {**mesh, "layers": "scan", "remat": True, "loss_chunk": 12}, "joint": mesh}
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=4"
    drive(list(runs("mesh", hardware)), environment={"CPU_NUM_DEVICES": "4", "XLA_FLAGS": flags})
    for kind in ("block", "joint"):
        rows = {name: rows_of({"output_dir": str(tmp_path / f"{name}-{kind}")}) for name in ("one", "pair", "mesh")}
        for name in ("pair", "mesh"):
            want = [row["loss"] for row in rows["one"]]
            assert [row["loss"] for row in rows[name]] == pytest.approx(want, abs=1e-5), (name, kind)
        assert [row["block_size"] for row in rows["mesh"]] == [1, 1, 2, 2, 4, 4]
        assert [row["compile_count"] for row in rows["mesh"]] == [1] * 6


def test_validation_has_one_level_per_row_and_the_blocks_of_the_model(run_config, shards_dir):
    held_out = {"every": 1, "batches": 2, "data": {"sources": [{"path": str(shards_dir / "validation")}]}}
    config = merge(merge(run_config, JOINT), {"evaluation": held_out})
    config["blocks"] |= {"complementary": True, "growth_steps": 4}
    _, evaluation = batches_of(config)
    batch = evaluation.batch(0)
    assert batch["labels"].shape == batch["loss_weights"].shape == (8, 32)  # the noisy copy alone, once
    assert (batch["loss_weights"] == batch["loss_weights"][:, :1]).all()
    assert np.unique(batch["group"][batch["segment_ids"] > 0] % 2).tolist() == [0, 1]
    starts = batch["group"][:, :32][batch["segment_ids"][:, :32] > 0] // 2
    assert set(starts % 4) == {0}
    assert evaluation.batch(0)["labels"].tolist() == batch["labels"].tolist()
    plain = batches_of(merge(run_config, {"evaluation": held_out}))[1].batch(0)
    assert np.array_equal(plain["labels"], batch["labels"])  # the noise of every run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "blocks"}, "objective must be one of masked, block, joint, got 'blocks'"),
        ({"objective": "joint"}, "blocks.autoregressive_weight must be given with objective joint and only with it"),
        (
            {"objective": "block", "blocks": {"autoregressive_weight": 1.0}},
            "must be given with objective joint and only with it, got objective 'block' and 1.0",
        ),
        ({"blocks": {"complementary": True}}, "blocks says nothing with objective 'masked': leave it out or take"),
        (
            {"objective": "block", "model": {"attention_annealing_steps": 3}},
            "attention_annealing_steps widens attention to full, which objective 'block' never has",
        ),
        (
            {"objective": "block", "model": {"attn_implementation": "splash"}, "hardware": {"backend": "xla"}},
            "objective 'block' needs model.attn_implementation sdpa, eager or flex_attention: 'splash' knows segments",
        ),
        ({"model": {"attention": "block_causal"}}, "give model.config.attention instead, got 'block_causal'"),
        ({"objective": "block", "blocks": {"growth_steps": 0}}, "blocks.growth_steps must be >= 1, got 0"),
        (
            {"objective": "joint", "blocks": {"autoregressive_weight": float("inf")}},
            "blocks.autoregressive_weight must be a finite number > 0, got inf",
        ),
        (
            {"objective": "block", "blocks": {"complementary": True}, "masking": {"t_min": 0.5}},
            "masking.t_min must be below 0.5 with blocks.complementary, .*, got 0.5",
        ),
    ],
)
def test_settings_that_contradict_are_refused_before_a_model_is_built(run_config, changes, message):
    with pytest.raises(ValueError, match=message):
        from_dict(RunConfig, merge(run_config, changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective": "block"},
            "objective 'block' needs a model with attention 'block_causal', got 'full': set model.attention=bloc",
        ),
        (
            {"model": {"config": BLOCKS}},
            "objective 'masked' needs a model with attention 'full', got 'block_causal': set objective 'block' or",
        ),
        (
            {"objective": "block", "model": {"config": {"attention": "block_causal"}}},
            "block_size must be in .* got None",
        ),
        (
            {"objective": "block", "model": {"config": {**BLOCKS, "block_size": 64}}},
            "the model's block_size must be at most seq_len 32, got 64",
        ),
        (
            {**BLOCK, "model": {"config": {**BLOCKS, "block_size": 6}}, "blocks": {"growth_steps": 4}},
            "each size must divide the next: it needs a model whose block_size is a power of two, got block_size 6",
        ),
        ({**BLOCK, "blocks": {"growth_steps": 1}}, "blocks.growth_steps must be at least 2, one step for each size"),
        (
            {**JOINT, "model": {"config": {**BLOCKS, "logits_shift": False}}},
            "objective 'joint' needs a model with logits_shift true",
        ),
    ],
)
def test_an_objective_that_is_not_of_the_model_is_refused(run_config, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(from_dict(RunConfig, merge(run_config, changes)))


def test_the_block_doubles_in_equal_parts_of_its_growth():
    sizes = [BlockConfig(growth_steps=10).size_at(step, 32) for step in range(12)]
    assert sizes == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 32, 32]
    assert BlockConfig().size_at(0, 24) == 24
    BlockConfig(growth_steps=5).check_growth(32)
