"""A run goes on anywhere: on another backend, mesh or number of processes, after a signal and after kill -9."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from coda_pretrain.checkpoints.checkpoint import committed_checkpoints
from coda_pretrain.checkpoints.export import main as export_main
from coda_pretrain.config import RunConfig
from coda_pretrain.plain_data import from_dict, merge
from coda_pretrain.train.trainer import Trainer
from coda_pretrain.watch.metrics import read_rows

HARDWARE = {
    "cpu": {"num_threads": 1},
    "pair": {"num_threads": 1},
    "line": {"backend": "xla", "mesh": {"data": 1, "fsdp": 8, "tensor": 1}},
    "cube": {"backend": "xla", "mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
}
STOPPED = 3

KILLED = """
import json, os, random, signal, sys, time
import torch
from coda_pretrain.config import RunConfig
from coda_pretrain.plain_data import from_dict, merge
from coda_pretrain.train.trainer import Trainer

torch.set_num_threads(1)

def train(config, dies_at=None):
    trainer = Trainer(from_dict(RunConfig, config))
    if dies_at is not None:  # at this file operation, most of which belong to saving and removing checkpoints
        count = iter(range(dies_at, -1, -1))
        def hook(event, arguments):
            name = arguments[0] if arguments else ""
            if event in EVENTS and isinstance(name, (str, os.PathLike)) and "checkpoints" in os.fspath(name):
                if next(count) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
    trainer.train()
    trainer.close()

EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir")

def child(*arguments):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            train(*arguments)
            status = 0
        finally:
            os._exit(status)
    return pid

rng = random.Random(0)
template = json.loads(sys.argv[1])
started = time.perf_counter()
assert os.waitpid(child(merge(template, {"output_dir": sys.argv[2] + "/whole"})), 0)[1] == 0
duration = time.perf_counter() - started
report = []
for number in range(20):
    config = merge(template, {"output_dir": f"{sys.argv[2]}/{number}"})
    if number % 2:
        pid = child(config, rng.randrange(60))
    else:
        pid = child(config)
        time.sleep(rng.uniform(0.1, 1.0) * duration)
        os.kill(pid, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    report.append([killed, os.waitpid(child(config), 0)[1]])
print(json.dumps(report), flush=True)
os._exit(0)
"""
"""Kills twenty runs, half of them at a random moment and half at a random file operation, and starts each again."""


GOES_ON = {"cpu": ["line", "cube"], "pair": ["cpu"], "line": ["pair"], "cube": ["pair"]}
"""Whose checkpoints each goes on from: those of another backend, made before its own launch, which is the only one."""


def trained_here(run):
    trainer = Trainer(from_dict(RunConfig, run["config"]))
    step = trainer._step

    def signalled(reporter):
        if run["stop"] and trainer.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(reporter)

    trainer._step = signalled
    trainer.train()
    trainer.close()


def exported_from(run, output):
    """The weights of a run's newest checkpoint, by the command line, in this process, which has no devices of XLA."""
    assert export_main(["--checkpoint_dir", str(run), "--output_dir", str(output)]) == 0
    return load_file(output / "model.safetensors")


def losses_in(folder):
    return {row["step"]: row["loss"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row}


@pytest.mark.parametrize("pairs", ["each with another", pytest.param("all", marks=pytest.mark.slow)])
def test_each_backend_stops_at_a_signal_and_goes_on_from_the_checkpoint_of_another(tmp_path, run_config, drive, pairs):
    devices = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8"}

    def run(name, hardware, *, stop=False):
        config = merge(run_config, {"output_dir": str(tmp_path / name), "hardware": HARDWARE[hardware]})
        return {"config": config, "stop": stop}

    def continued(target, source):
        name = f"{target}-from-{source}"
        shutil.copytree(tmp_path / source / "checkpoints", tmp_path / name / "checkpoints")
        return run(name, target)

    def others(target):
        return [name for name in HARDWARE if name != target] if pairs == "all" else GOES_ON[target]

    def going_on(target, *sources):
        return [continued(target, source) for source in others(target) if source in sources]

    trained_here(run("whole", "cpu"))
    trained_here(run("cpu", "cpu", stop=True))
    in_parts = run("parts", "pair", stop=True)
    in_parts["config"]["micro_batch_size"] = 4
    drive([run("pair", "pair", stop=True), in_parts, *going_on("pair", "cpu")], num_processes=2)
    assert [path.name for path in committed_checkpoints(tmp_path / "parts" / "checkpoints")] == ["step-00000002"]
    stopped = [run("line", "line", stop=True), run("cube", "cube", stop=True)]
    earlier = [*going_on("line", "cpu", "pair"), *going_on("cube", "cpu", "pair")]
    drive([*stopped, *earlier], environment=devices)
    whole = losses_in(tmp_path / "whole")
    for source in HARDWARE:
        assert [path.name for path in committed_checkpoints(tmp_path / source / "checkpoints")] == ["step-00000003"]
        assert losses_in(tmp_path / source) == pytest.approx({s: whole[s] for s in range(1, STOPPED + 1)}, abs=1e-5)
    exported = {source: exported_from(tmp_path / source, tmp_path / f"export-{source}") for source in HARDWARE}
    for source in HARDWARE:
        assert exported[source].keys() == exported["cpu"].keys()
        for name, weight in exported["cpu"].items():
            # AdamW makes much of rounding where a gradient is nearly zero; one step moves a weight by 1e-2.
            torch.testing.assert_close(exported[source][name], weight, rtol=0, atol=1e-3)
    for later in going_on("cpu", *HARDWARE):
        trained_here(later)
    if pairs == "all":
        drive(going_on("pair", "line", "cube"), num_processes=2)
        drive([*going_on("line", "cube"), *going_on("cube", "line")], environment=devices)
    for target in HARDWARE:
        for source in others(target):
            resumed = losses_in(tmp_path / f"{target}-from-{source}")
            assert resumed == pytest.approx({s: whole[s] for s in whole if s > STOPPED}, abs=1e-5), (target, source)


def test_twenty_runs_killed_at_random_points_and_inside_saves_go_on_to_the_uninterrupted_losses(tmp_path, run_config):
    config = merge(run_config, {"max_steps": 10, "checkpoint": {"every": 2, "keep": 2}})
    command = [sys.executable, "-c", KILLED, json.dumps(config), str(tmp_path / "runs")]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert sum(killed for killed, _ in report) >= 12  # a run may end before its moment comes
    assert [status for _, status in report] == [0] * 20, done.stderr[-6000:]
    whole = losses_in(tmp_path / "runs" / "whole")
    for number in range(20):
        assert losses_in(tmp_path / "runs" / str(number)) == whole, number
        kept = committed_checkpoints(tmp_path / "runs" / str(number) / "checkpoints")
        assert [path.name for path in kept] == ["step-00000008", "step-00000010"]
