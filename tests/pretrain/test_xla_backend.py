"""torch_xla SPMD on four virtual CPU devices: same losses as plain torch, same checkpoints, no surprise compilation.

Each run is a process of its own: torch_xla must be set up before anything else starts torch's autograd engine.
"""

import shutil
from pathlib import Path

import pytest

from coda_pretrain.config import RunConfig
from coda_pretrain.metrics import read_rows
from coda_pretrain.plain_data import from_dict, merge
from coda_pretrain.trainer import Trainer

FOUR_DEVICES = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}
TWO_BY_TWO = {"backend": "xla", "mesh": {"data": 1, "fsdp": 2, "tensor": 2}}
FOUR = {"backend": "xla", "mesh": {"data": 1, "fsdp": 4, "tensor": 1}}


def losses_of(rows):
    return [row["loss"] for row in rows if "loss" in row]


def trained_here(config):
    trainer = Trainer(from_dict(RunConfig, config))
    trainer.train()
    trainer.close()
    return losses_of(read_rows(trainer.output_dir / "metrics.jsonl"))


def test_two_by_two_devices_train_like_plain_torch_with_one_graph_per_function(tmp_path, run_config, train_in_process):
    plain = trained_here({**run_config, "output_dir": str(tmp_path / "cpu")})
    rows = train_in_process({**run_config, "hardware": TWO_BY_TWO}, environment=FOUR_DEVICES)
    assert losses_of(rows) == pytest.approx(plain, abs=1e-5)
    assert [row["compile_count"] for row in rows] == [3] * 6  # gradients, norm, update: under a changing rate and masks


def test_other_meshes_and_plain_torch_continue_a_checkpoint_of_two_by_two_devices(
    tmp_path, run_config, train_in_process
):
    config = merge(run_config, {"optimizer": {"name": "adafactor"}, "checkpoint": {"every": 3}})
    plain = trained_here({**config, "output_dir": str(tmp_path / "cpu")})
    square = {**config, "output_dir": str(tmp_path / "square"), "hardware": TWO_BY_TWO}
    rows = train_in_process(square, environment=FOUR_DEVICES)
    assert losses_of(rows) == pytest.approx(plain, abs=1e-5)
    # The first update is a graph of its own: Adafactor's decay is exactly 0 there.
    assert [row["compile_count"] for row in rows] == [3, 4, 4, 4, 4, 4]

    def continued(name, **changes):
        saved = Path("checkpoints") / "step-00000003"
        shutil.copytree(tmp_path / "square" / saved, tmp_path / name / saved)
        return {**config, "output_dir": str(tmp_path / name), **changes}

    assert trained_here(continued("plain")) == pytest.approx(plain[3:], abs=1e-5)
    line = continued("line", hardware=FOUR, micro_batch_size=4)
    assert losses_of(train_in_process(line, environment=FOUR_DEVICES)) == pytest.approx(plain[3:], abs=1e-5)
