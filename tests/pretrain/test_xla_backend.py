"""torch_xla SPMD on virtual CPU devices: same losses as plain torch, same checkpoints, no surprise compilation.

Runs are in processes of their own, one for each number of devices: torch_xla must be set up before anything else
starts torch's autograd engine.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from coda_pretrain.config import RunConfig
from coda_pretrain.plain_data import from_dict, merge
from coda_pretrain.train.trainer import Trainer
from coda_pretrain.watch.metrics import read_rows

TABLES = Path(__file__).resolve().parents[2] / "pre-train/configs/sharding"


def losses_of(rows):
    return [row["loss"] for row in rows if "loss" in row]


def trained_here(config):
    trainer = Trainer(from_dict(RunConfig, config))
    trainer.train()
    trainer.close()
    return losses_of(read_rows(trainer.output_dir / "metrics.jsonl"))


def xla(data=1, fsdp=1, tensor=1, **settings):
    return {"backend": "xla", "mesh": {"data": data, "fsdp": fsdp, "tensor": tensor}, **settings}


def virtual_devices(count):
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={count}"
    return {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(count), "XLA_FLAGS": flags}


def table(name):
    return yaml.safe_load((TABLES / name).read_text())["hardware"]


SPLASH = {"model": {"attn_implementation": "splash"}}
MACHINES = {
    8: {
        "1x8x1": {"hardware": xla(fsdp=8)},
        "2x2x2 scan remat": {
            "hardware": xla(2, 2, 2, layers="scan", remat=True, loss_chunk=48, **table("fsdp_tensor.yaml")),
            "model": {"attention_annealing_steps": 3},
        },
    },
    4: {
        "splash 1x2x2 scan remat": {
            "hardware": xla(1, 2, 2, layers="scan", remat=True, interpret_kernels=True),
            **SPLASH,
        },
    },
    1: {"splash": {"hardware": xla(interpret_kernels=True), **SPLASH}},
}
"""Runs by the number of devices that they share."""


@pytest.fixture
def long_config(run_config):
    """Rows and heads of the sizes that a TPU's kernel takes."""
    return merge(run_config, {"seq_len": 128, "model": {"config": {"head_dim": 128, "max_position_embeddings": 128}}})


@pytest.mark.parametrize("devices", MACHINES)
def test_every_mesh_and_kernel_trains_like_plain_torch_with_one_compilation(
    tmp_path, long_config, train_in_process, drive, devices
):
    plain, runs = {}, {}
    for name, settings in MACHINES[devices].items():
        annealing = {} if name.startswith("splash") else {"model": settings.get("model", {})}
        plain[name] = trained_here(merge(long_config, {"output_dir": str(tmp_path / f"cpu {name}"), **annealing}))
        changes = {k: v for k, v in settings.items() if k != "hardware"} | {"output_dir": str(tmp_path / name)}
        runs[name] = {**merge(long_config, changes), "hardware": settings["hardware"]}  # replaces the CPU's
    if devices == 1:
        train_in_process(runs["splash"], environment=virtual_devices(devices))  # by the command line
    else:
        drive([{"config": config} for config in runs.values()], environment=virtual_devices(devices))
    for name, config in runs.items():
        rows = read_rows(Path(config["output_dir"]) / "metrics.jsonl")
        assert losses_of(rows) == pytest.approx(plain[name], abs=1e-5), name
        # Under a rate, masks and spans that change with every step.
        is_annealed = "attention_annealing_steps" in config["model"]
        graphs = [1] * 3 + [2] * 3 if is_annealed else [1] * 6  # attention that widens is another graph
        assert [row["compile_count"] for row in rows] == graphs, name


def test_accumulation_is_two_graphs_and_other_machines_continue_its_checkpoint(tmp_path, run_config, drive):
    config = merge(run_config, {"optimizer": {"name": "adafactor", "ema_decay": 0.9}, "checkpoint": {"every": 3}})
    plain = trained_here({**config, "output_dir": str(tmp_path / "cpu")})
    slices = {"hardware": {**xla(fsdp=2), "dcn_mesh": {"data": 2}}, "micro_batch_size": 4}
    square = {**config, "output_dir": str(tmp_path / "square"), **slices}
    saved = tmp_path / "square" / "checkpoints" / "step-00000003"

    def continued(name, **changes):
        return {**config, "output_dir": str(tmp_path / name), "checkpoint": {"resume": str(saved)}, **changes}

    line = continued("line", hardware=xla(fsdp=2, tensor=2))
    drive([{"config": square}, {"config": line}], environment=virtual_devices(4))
    rows = read_rows(tmp_path / "square" / "metrics.jsonl")
    assert losses_of(rows) == pytest.approx(plain, abs=1e-5)
    assert [row["compile_count"] for row in rows] == [2] * 6
    assert losses_of(read_rows(tmp_path / "line" / "metrics.jsonl")) == pytest.approx(plain[3:], abs=1e-5)
    assert trained_here(continued("plain")) == pytest.approx(plain[3:], abs=1e-5)


def test_offloading_is_refused_on_virtual_devices(tmp_path, run_config):
    config = {**run_config, "hardware": xla(layers="scan", remat=True, offload=True)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "coda_pretrain", "--config", str(tmp_path / "run.yaml")]
    environment = {**os.environ, **virtual_devices(1)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2, result.stderr[-3000:]
    assert "hardware.offload needs TPUs" in result.stderr
