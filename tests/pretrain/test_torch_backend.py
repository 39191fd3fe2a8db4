"""Several processes with FSDP2 over gloo: same losses as one process, same checkpoints."""

import shutil
from pathlib import Path

import pytest

from coda_pretrain.config import RunConfig
from coda_pretrain.devices.config import HardwareConfig
from coda_pretrain.devices.torch_backend import TorchBackend
from coda_pretrain.plain_data import from_dict, merge
from coda_pretrain.train.trainer import Trainer
from coda_pretrain.watch.metrics import read_rows


def losses_of(rows):
    return [row["loss"] for row in rows if "loss" in row]


def trained_here(config):
    trainer = Trainer(from_dict(RunConfig, config))
    trainer.train()
    trainer.close()
    return losses_of(read_rows(trainer.output_dir / "metrics.jsonl"))


def test_two_processes_train_like_one_and_their_checkpoint_continues_in_one(tmp_path, run_config, drive):
    config = merge(run_config, {"checkpoint": {"every": 3}, "micro_batch_size": 4})
    pairs = [
        merge(config, {"optimizer": {"name": name}, "output_dir": str(tmp_path / f"{name} in two")})
        for name in ("adamw", "adafactor")
    ]
    drive([{"config": pair} for pair in pairs], num_processes=2)
    saved = Path("checkpoints") / "step-00000003"
    for pair in pairs:
        folder = Path(pair["output_dir"])
        alone = trained_here({**pair, "output_dir": f"{folder} alone"})
        assert losses_of(read_rows(folder / "metrics.jsonl")) == pytest.approx(alone, abs=1e-5)
        shutil.copytree(folder / saved, Path(f"{folder} continued") / saved)
        assert trained_here({**pair, "output_dir": f"{folder} continued"}) == pytest.approx(alone[3:], abs=1e-5)


def test_weights_sharded_over_two_and_copied_over_two_train_like_one_process(tmp_path, run_config, train_in_process):
    alone = trained_here({**run_config, "output_dir": str(tmp_path / "alone")})
    config = merge(run_config, {"hardware": {"mesh": {"data": 2, "fsdp": 2}}})
    assert losses_of(train_in_process(config, num_processes=4)) == pytest.approx(alone, abs=1e-5)


def test_processes_take_equal_parts_of_the_batch_and_of_each_part_of_it():
    backend = TorchBackend(HardwareConfig())
    backend.num_processes = 4
    whole, halves = [], []
    for backend.rank in range(4):
        whole.append(backend.rows_for_process(16))
        halves.append(backend.rows_for_process(16, num_parts=2))
    assert whole == [list(range(4 * i, 4 * i + 4)) for i in range(4)]
    assert halves == [[2 * i, 2 * i + 1, 8 + 2 * i, 8 + 2 * i + 1] for i in range(4)]


def test_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"hardware\.backend 'cuda' needs a GPU"):
        TorchBackend(HardwareConfig(backend="cuda"))


def test_a_kernel_whose_package_is_missing_is_refused_before_a_model_is_built(monkeypatch):
    monkeypatch.setattr("coda_pretrain.devices.torch_backend.is_flash_attn_2_available", lambda: False)
    backend = TorchBackend(HardwareConfig())
    backend.prepare_kernel("sdpa")
    with pytest.raises(ValueError, match="'flash_attention_2' needs the package flash-attn, which is not installed"):
        backend.prepare_kernel("flash_attention_2")
