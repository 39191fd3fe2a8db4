"""A run goes on anywhere: on another backend, mesh or number of processes, after a signal and after kill -9."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coda_pretrain.checkpoint import committed_checkpoints
from coda_pretrain.metrics import read_rows
from coda_pretrain.plain_data import merge

HARDWARE = {
    "cpu": {"num_threads": 1},
    "pair": {"num_threads": 1},
    "line": {"backend": "xla", "mesh": {"data": 1, "fsdp": 8, "tensor": 1}},
    "cube": {"backend": "xla", "mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
}
STOPPED = 3

# Runs given on the command line, one after the other in one process (of each rank). A run may get SIGTERM in its third
# step, on the last rank only.
DRIVER = """
import json, os, signal, sys, time
import torch
import torch.distributed as dist
from coda_pretrain.config import RunConfig
from coda_pretrain.plain_data import from_dict
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo")
from coda_pretrain.trainer import Trainer
for run in json.loads(sys.argv[1]):
    trainer = Trainer(from_dict(RunConfig, run["config"]))
    step = trainer._step
    def signalled(reporter, trainer=trainer, step=step, run=run):
        if run["stop"] and rank == world - 1 and trainer.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(reporter)
    trainer._step = signalled
    trainer.train()
    trainer.close()
if world > 1:
    dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture
def drive(tmp_path):
    def drive(runs, *, num_processes=1, environment=None):
        driver = tmp_path / "driver.py"
        driver.write_text(DRIVER)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        command = [sys.executable, *(launcher if num_processes > 1 else []), str(driver), json.dumps(runs)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2", **(environment or {})}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-6000:]

    return drive


def losses_in(folder):
    return {row["step"]: row["loss"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row}


def test_each_backend_stops_at_a_signal_and_goes_on_from_the_checkpoint_of_each_other(tmp_path, run_config, drive):
    devices = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8"}

    def run(name, hardware, *, stop=False):
        config = merge(run_config, {"output_dir": str(tmp_path / name), "hardware": HARDWARE[hardware]})
        return {"config": config, "stop": stop}

    def continued(target, source):
        name = f"{target}-from-{source}"
        shutil.copytree(tmp_path / source / "checkpoints", tmp_path / name / "checkpoints")
        return run(name, target)

    def others(target):
        return [name for name in HARDWARE if name != target]

    drive([run("whole", "cpu"), run("cpu", "cpu", stop=True)])
    drive([run("pair", "pair", stop=True)], num_processes=2)
    drive([run("line", "line", stop=True), run("cube", "cube", stop=True)], environment=devices)
    whole = losses_in(tmp_path / "whole")
    for source in HARDWARE:
        assert [path.name for path in committed_checkpoints(tmp_path / source / "checkpoints")] == ["step-00000003"]
        assert losses_in(tmp_path / source) == pytest.approx({s: whole[s] for s in range(1, STOPPED + 1)}, abs=1e-5)
    drive([continued("cpu", source) for source in others("cpu")])
    drive([continued("pair", source) for source in others("pair")], num_processes=2)
    drive([continued(mesh, source) for mesh in ("line", "cube") for source in others(mesh)], environment=devices)
    for target in HARDWARE:
        for source in others(target):
            resumed = losses_in(tmp_path / f"{target}-from-{source}")
            assert resumed == pytest.approx({s: whole[s] for s in whole if s > STOPPED}, abs=1e-5), (target, source)
