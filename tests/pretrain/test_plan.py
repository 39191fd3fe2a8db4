"""Memory, speed and days before a run."""

import json

import pytest
import torch

from coda_pretrain.__main__ import main
from coda_pretrain.config import RunConfig
from coda_pretrain.plain_data import from_dict, merge
from coda_pretrain.plan import compilation
from coda_pretrain.plan.memory import memory_per_chip, weight_shards
from coda_pretrain.plan.plan import Device, expected_row, make_plan, parse_device
from coda_pretrain.train.trainer import Trainer
from coda_pretrain.watch.flops import doubled_pairs, work_of_batch
from CoDALanguageModel import CoDAConfig
from CoDALanguageModel.errors import UserError

LARGER = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "head_dim": 32}
SCIENCE = ("pre-train/configs/pretrain.yaml", "pre-train/configs/midtrain.yaml")


def planned(config, **options):
    config = from_dict(RunConfig, config)
    return make_plan(config, Device("1 x v5e", "v5e", 1), **options)


def highest_allocation(path):
    """Bytes over the start that torch's allocator reports in a trace of its profiler."""
    events = json.loads(path.read_text())["traceEvents"]
    memory = [event["args"] for event in events if event.get("name") == "[memory]"]
    totals = [arguments["Total Allocated"] for arguments in memory]
    return max(totals) - (totals[0] - memory[0]["Bytes"])


BLOCKS = {"attention": "block_causal", "block_size": 8}
BY_BLOCKS = {
    "masked": {},
    "block": {"objective": "block", "blocks": {"complementary": True}, "model": {"config": BLOCKS}},
    "joint": {"objective": "joint", "blocks": {"autoregressive_weight": 1.0}, "model": {"config": BLOCKS}},
}


@pytest.mark.parametrize(
    ("objective", "remat"), [("masked", False), ("masked", True), ("block", True), ("joint", False)]
)
def test_memory_is_what_torch_allocates_within_a_tenth(tmp_path, run_config, objective, remat):
    changes = {"model": {"config": LARGER}, "hardware": {"remat": remat}, "global_batch_size": 16, "seq_len": 64}
    config = from_dict(RunConfig, merge(merge(run_config, changes), BY_BLOCKS[objective]))
    trainer = Trainer(config)
    trainer._step(None)  # what is allocated once and kept is there
    batch = trainer.batches.make(1)
    for parameter in trainer.parameters.values():
        parameter.grad = torch.zeros_like(parameter)  # a part of its own in the plan
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.functions.step([batch], learning_rate=1e-3, count=2)
    trainer.close()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    measured = highest_allocation(tmp_path / "trace.json")
    share = float((batch["labels"][:, :64] != -100).mean())
    memory = memory_per_chip(config, trainer.model_config, (1, 1, 1), masked_share=share)
    assert memory.activations + memory.working + memory.attention_mask == pytest.approx(measured, rel=0.1)
    weights = [p for p in trainer.parameters.values()]
    assert memory.weights == memory.gradients == 4 * sum(p.numel() for p in weights)
    assert memory.optimizer == {"exp_avg": memory.weights, "exp_avg_sq": memory.weights}


def test_shards_are_those_of_the_mesh(run_config):
    shape = CoDAConfig()
    rule = {"hardware": {"backend": "xla"}, "optimizer": {"name": "adafactor"}}
    shards = weight_shards(from_dict(RunConfig, merge(run_config, rule)), shape, (2, 16, 2))
    assert shards["lm_head.weight"].shape == (151_936 // 2, 2048 // 16)
    assert shards["model.layers.3.mlp.down_proj.weight"].shape == (2048 // 16, 6144 // 2)
    assert shards["model.norm.weight"].shape == (2048,)
    gpu = weight_shards(from_dict(RunConfig, run_config), shape, (1, 8, 1))
    assert gpu["lm_head.weight"].shape == (151_936 // 8, 2048)


def test_adafactor_keeps_rows_and_columns_and_adamw_two_copies(run_config):
    adafactor = planned(merge(run_config, {"optimizer": {"name": "adafactor"}}))["memory"]["no_remat"]
    assert set(adafactor["optimizer"]) == {"exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"}
    assert sum(adafactor["optimizer"].values()) < 0.1 * adafactor["weights"]


def test_speed_and_days_follow_from_the_operations_and_the_assumed_utilization(run_config):
    run = merge(run_config, {"max_steps": 1000})
    plan = planned(run, mfu=0.5, document_tokens=8)
    assert plan["step_s"] == pytest.approx(plan["flops_per_step"] / (0.5 * 197e12))
    assert plan["days"] == pytest.approx(1000 * plan["step_s"] / 86400)
    assert plan["tokens"] == 1000 * 8 * 32
    assert planned(run, mfu=0.25, document_tokens=8)["days"] == pytest.approx(2 * plan["days"])


def test_documents_are_read_from_the_data_and_masking_shortens_the_work(run_config):
    plain = {**run_config, "masking": {"t_min": 0.001}}
    row = expected_row(from_dict(RunConfig, plain), None)
    assert row.source == "documents as in 32 rows of the data"
    assert row.work.attended_pairs < 32**2
    assert row.masked_share == pytest.approx(0.5005)
    table_3 = {"schedule": "per_epoch", "per_epoch": [[0.2, 0.2, 0.25], [0.0, 0.0, 0.0]]}
    masked = expected_row(from_dict(RunConfig, {**run_config, "masking": table_3}), 16)
    assert masked.masked_share == pytest.approx(0.5005 * 0.9)
    assert masked.work.tokens == pytest.approx(32 * 0.95)


@pytest.mark.parametrize("objective", ["block", "joint"])
@pytest.mark.parametrize("masking", [{"t_min": 0.001}, {"prefix_probability": 0.3}])
def test_the_work_by_blocks_is_that_of_the_doubled_rows(run_config, objective, masking):
    config = merge({**run_config, "masking": masking}, BY_BLOCKS[objective])
    trainer = Trainer(from_dict(RunConfig, config))
    blocks, copies = trainer.batches.blocks(0), trainer.config.rows_per_sample
    works = [trainer.batches.make(step) for step in range(4)]
    trainer.close()
    works = [work_of_batch(batch["segment_ids"], batch["labels"], blocks) for batch in works]
    row = expected_row(trainer.config, None, blocks)
    for name in ("tokens", "attended_pairs", "scored"):
        measured = sum(getattr(work, name) for work in works) / 32
        assert getattr(row.work, name) == pytest.approx(measured, rel=0.12), name
    assert expected_row(trainer.config, 16, blocks).work.attended_pairs == copies * 2 * doubled_pairs(16, blocks)
    plan = planned(config)
    assert (plan["block_size"], plan["row_length"], plan["rows_at_a_time"]) == (8, 64, 8 * copies)
    assert plan["tokens"] == 6 * 8 * 32  # of the data


@pytest.mark.parametrize("objective", BY_BLOCKS)
def test_the_batch_that_is_compiled_has_the_arrays_of_a_run(run_config, objective):
    config = merge(run_config, BY_BLOCKS[objective])
    trainer = Trainer(from_dict(RunConfig, config))
    trainer.close()
    made = {name: array for name, array in trainer.batches.make(0).items() if name != "t"}
    arrays = compilation._batch(trainer.config)
    assert {n: (a.shape, a.dtype) for n, a in arrays.items()} == {n: (a.shape, a.dtype) for n, a in made.items()}


@pytest.mark.parametrize(
    ("name", "device"),
    [("v4-1024", ("v4", 512)), ("v5p-64", ("v5p", 32)), ("v5e-8", ("v5e", 8)), ("v5litepod-16", ("v5e", 16))]
    + [("v6e-8", ("v6e", 8)), ("8xH100", ("H100", 8)), ("1xH200", ("H200", 1)), ("4xA100", ("A100", 4))],
)
def test_machines_are_named_as_their_vendors_do(name, device):
    assert parse_device(name) == (name, *device)


@pytest.mark.parametrize("name", ["v5p-63", "v7-8", "8xB200", "H100", "0xH100", "v4-1", "8xv5e"])
def test_an_unknown_machine_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"must be one of TPU slices v4-N, v5p-N, .*NxH100, NxH200, got '" + name):
        parse_device(name)


def test_the_command_plans_a_published_run_without_its_folders(repo, capsys, monkeypatch):
    monkeypatch.chdir(repo)
    hardware = ["--config", "pre-train/configs/hardware/v5p_64.yaml"]
    assert main(["plan", "--config", SCIENCE[0], *hardware, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["chips"], plan["mesh"]) == (32, {"data": 1, "fsdp": 16, "tensor": 2})
    assert plan["tokens"] == 50_000 * 512 * 8192
    assert plan["fits"]
    assert main(["plan", "--config", SCIENCE[1], "--device", "8xB200"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("got '8xB200'")
    assert main(["plan", "--config", SCIENCE[0], *hardware, "--device", "v5e-8"]) == 2
    assert "hardware.mesh.fsdp=-1 would fit v5e-8" in capsys.readouterr().err
    assert main(["plan", "--config", SCIENCE[0]]) == 2
    assert "must name hardware.chip and every size of hardware.mesh, or --device" in capsys.readouterr().err


def test_the_table_shows_both_ways_and_what_is_assumed(run_config, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(run_config))
    assert main(["plan", "--config", str(path), "--device", "1xH100"]) == 0
    shown = capsys.readouterr().out
    for words in ("with remat", "without (configured)", "optimizer: exp_avg_sq", "40% of 989 TFLOP/s", "days"):
        assert words in shown


def test_a_folder_that_describes_no_model_is_refused_by_its_field(tmp_path, run_config):
    folder = {"model": {"init_from": str(tmp_path), "config": None}}
    for text, message in (
        ('{"model_type": "qwen3", "hidden_act": 3}', "hidden_act must be the name of an activation, got 3"),
        ('{"model_type": "qwen3", "num_attention_heads": null}', "num_attention_heads must be an integer, got None"),
        ('{"model_type": "qwen3", "use_cache": "x"}', "config.json: .*use_cache"),
        ('{"model_type": "CoDA", "dtype": "x"}', "dtype must be one of .*, got 'x'"),
        ("[]", "config.json' must hold a JSON object"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            planned(merge(run_config, folder))
