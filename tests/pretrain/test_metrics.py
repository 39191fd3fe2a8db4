import gzip
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from coda_pretrain.config import RunConfig
from coda_pretrain.devices import create_backend
from coda_pretrain.devices.config import HardwareConfig
from coda_pretrain.plain_data import from_dict, merge
from coda_pretrain.train.trainer import Trainer
from coda_pretrain.watch.flops import Work, training_flops
from coda_pretrain.watch.metrics import MetricsFile, Reporter, UtilizationMeter, peak_flops, read_rows
from CoDALanguageModel import CoDAConfig


def rows_of_run(config):
    trainer = Trainer(from_dict(RunConfig, config))
    trainer.train()
    trainer.close()
    return read_rows(Path(config["output_dir"]) / "metrics.jsonl")


def test_a_resumed_file_drops_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": step / 10} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    file = MetricsFile(path, finished_steps=2)
    file.write({"step": 3, "loss": 9.0})
    file.close()
    assert read_rows(path) == [*rows[:2], {"step": 3, "loss": 9.0}]


def test_without_a_terminal_rows_become_log_lines_and_the_tracker_gets_them(tmp_path, caplog):
    class Tracker:
        rows, finished = [], False

        def log(self, row, step):
            self.rows.append((step, row))

        def finish(self):
            Tracker.finished = True

    tracker = Tracker()
    with (
        caplog.at_level(logging.INFO),
        Reporter(tmp_path / "metrics.jsonl", finished_steps=0, num_steps=8, trackers=[tracker]) as reporter,
    ):
        reporter.step(1)
        reporter.row({"step": 1, "loss": 2.5, "tokens_per_s": 1234.0})
    assert "step 1/8  loss 2.5  tokens/s 1234" in caplog.text
    assert tracker.rows == [(1, {"loss": 2.5, "tokens_per_s": 1234.0})]
    assert Tracker.finished


def test_mfu_is_the_work_of_all_rows_over_time_and_peak():
    shape = CoDAConfig()
    meter = UtilizationMeter(2e15, shape, step_rows=4)
    segment_ids, labels = np.ones((2, 8), dtype=np.int64), np.full((2, 8), 5)
    meter.add({"segment_ids": segment_ids, "labels": labels}, seconds=0.5)  # half of the rows are another process's
    meter.add({"segment_ids": segment_ids, "labels": labels}, seconds=1.5)
    assert meter.mfu() == pytest.approx(2 * training_flops(shape, Work(32, 256, 32)) / 2.0 / 2e15)
    assert meter.mfu() is None  # no step since


def test_the_peak_is_that_of_all_devices_of_a_named_chip_or_the_one_given_or_unknown(monkeypatch):
    assert peak_flops(create_backend(HardwareConfig(chip="v5p"))) == 459e12
    assert peak_flops(create_backend(HardwareConfig(chip="v5p", peak_tflops=2.5))) == 2.5e12
    assert peak_flops(create_backend(HardwareConfig())) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    gpus = SimpleNamespace(config=HardwareConfig(backend="cuda"), mesh_shape=(2, 4, 1))
    assert peak_flops(gpus) == 8 * 989e12


def test_a_run_reports_its_utilization_only_where_the_peak_is_known(tmp_path, run_config):
    unknown = rows_of_run({**run_config, "max_steps": 2})
    assert unknown[0]["mfu"] is None
    known = merge(run_config, {"hardware": {"peak_tflops": 0.5}, "output_dir": str(tmp_path / "known"), "max_steps": 2})
    assert all(0 < row["mfu"] < 1 for row in rows_of_run(known))


def test_rows_go_to_wandb_under_an_id_that_a_resumed_run_finds_again(tmp_path, run_config, monkeypatch):
    runs = []

    def init(**settings):
        run = SimpleNamespace(settings=settings, rows=[], finished=False)
        run.log = lambda row, step: run.rows.append((step, row))
        run.finish = lambda: setattr(run, "finished", True)
        runs.append(run)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=object()))
    config = merge(run_config, {"metrics": {"wandb": {"project": "coda", "mode": "offline"}}, "max_steps": 2})
    rows = rows_of_run(config)
    rows_of_run({**config, "max_steps": 3})
    first, second = runs
    assert [row for _, row in first.rows] == [{k: v for k, v in row.items() if k != "step"} for row in rows]
    assert first.settings["mode"] == "offline"
    assert first.settings["id"] == second.settings["id"]
    assert second.settings["resume"] == "allow"
    assert [step for step, _ in second.rows] == [3]
    assert first.finished
    assert second.finished


def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(run_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"metrics\.tensorboard needs the package tensorboard, which is not installed"):
        Trainer(from_dict(RunConfig, merge(run_config, {"metrics": {"tensorboard": True}})))


def test_rows_go_to_tensorboard(run_config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = merge(run_config, {"metrics": {"tensorboard": True}, "max_steps": 3})
    rows = rows_of_run(config)
    events = EventAccumulator(str(Path(config["output_dir"]) / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])
    assert "mfu" not in events.Tags()["scalars"]  # unknown here


def test_the_asked_for_steps_are_profiled(run_config):
    rows_of_run(merge(run_config, {"metrics": {"profile_steps": [2, 3]}, "max_steps": 4}))
    (path,) = (Path(run_config["output_dir"]) / "profile").iterdir()
    assert path.name == "steps-2-3-rank0.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    updates = [event for event in events if event.get("name", "").startswith("Optimizer.step")]
    assert len(updates) == 2


def test_a_profile_cut_short_by_the_end_of_the_run_is_written(run_config):
    rows_of_run(merge(run_config, {"metrics": {"profile_steps": [2, 9]}, "max_steps": 2}))
    assert [path.name for path in (Path(run_config["output_dir"]) / "profile").iterdir()] == ["steps-2-9-rank0.json.gz"]


def test_validation_loss_by_noise_level_adds_up_to_the_whole(run_config, shards_dir):
    held_out = {"every": 6, "batches": 3, "data": {"sources": [{"path": str(shards_dir / "validation")}]}}
    trainer = Trainer(from_dict(RunConfig, merge(run_config, {"evaluation": held_out})))
    trainer.train()
    batches = [trainer.evaluation.batch(i) for i in range(trainer.evaluation.num_batches)]
    trainer.close()
    assert len(batches) == 3
    edges = [0.001 + 0.999 * i / 3 for i in range(4)]
    for batch, low, high in zip(batches, edges, edges[1:], strict=False):
        assert ((batch["t"] >= low - 1e-6) & (batch["t"] <= high + 1e-6)).all()
        assert batch["loss_weights"] == pytest.approx(1 / (batch["t"] * 8 * 32))
    row = next(row for row in read_rows(trainer.output_dir / "metrics.jsonl") if "eval_loss" in row)
    bins = {key: value for key, value in row.items() if key.startswith("eval_loss_t")}
    assert list(bins) == ["eval_loss_t0.00-0.33", "eval_loss_t0.33-0.67", "eval_loss_t0.67-1.00"]
    assert np.mean(list(bins.values())) == pytest.approx(row["eval_loss"])
    assert len({round(value, 6) for value in bins.values()}) == 3
