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


@pytest.mark.parametrize(("optimizer", "graphs"), [("adafactor", [3, 4, 4, 4, 4, 4]), ("adamw", [3] * 6)])
def test_meshes_train_alike_and_continue_each_others_checkpoints(
    tmp_path, run_config, train_in_process, optimizer, graphs
):
    config = merge(run_config, {"optimizer": {"name": optimizer}, "checkpoint": {"every": 3}})
    plain = trained_here({**config, "output_dir": str(tmp_path / "cpu")})
    square = {**config, "output_dir": str(tmp_path / "square"), "hardware": TWO_BY_TWO}
    rows = train_in_process(square, environment=FOUR_DEVICES)
    assert losses_of(rows) == pytest.approx(plain, abs=1e-5)
    # One graph each for gradients, norm and update. Adafactor's first update is another one: its decay is 0 there.
    assert [row["compile_count"] for row in rows] == graphs

    def continued(name, source, **changes):
        saved = Path("checkpoints") / "step-00000003"
        shutil.copytree(source / saved, tmp_path / name / saved)
        return {**config, "output_dir": str(tmp_path / name), **changes}

    on_cpu = trained_here(continued("cpu-from-square", tmp_path / "square"))
    assert on_cpu == pytest.approx(plain[3:], abs=1e-5)
    line = continued("line", tmp_path / "square", hardware=FOUR, micro_batch_size=4)
    assert losses_of(train_in_process(line, environment=FOUR_DEVICES)) == pytest.approx(plain[3:], abs=1e-5)


def test_a_batch_that_the_devices_cannot_split_is_refused(run_config, train_in_process):
    config = {**run_config, "hardware": FOUR, "global_batch_size": 6}
    with pytest.raises(AssertionError, match=r"global_batch_size must be a multiple of the 4 devices .* got 6"):
        train_in_process(config, environment=FOUR_DEVICES)
