"""Saving while training goes on, to folders and to stores behind URLs: what a failure does, what is never believed."""

import errno
import sys
import threading
import uuid

import pytest
import torch

from coda_pretrain.checkpoints.checkpoint import (
    MARKER,
    CheckpointError,
    TrainState,
    checkpoint_to_resume,
    committed_checkpoints,
    fault_of,
    load_checkpoint,
    set_aside_later_checkpoints,
)
from coda_pretrain.checkpoints.export import main as export_main
from coda_pretrain.checkpoints.saver import Saver, check_folder, snapshot
from coda_pretrain.config import RunConfig
from coda_pretrain.devices.config import HardwareConfig
from coda_pretrain.devices.torch_backend import TorchBackend
from coda_pretrain.places import place_of
from coda_pretrain.plain_data import from_dict, merge
from coda_pretrain.train.trainer import Trainer
from coda_pretrain.watch.metrics import read_rows


@pytest.fixture
def backend():
    return TorchBackend(HardwareConfig())


@pytest.fixture
def store():
    return place_of(f"memory://bucket-{uuid.uuid4().hex}/run/checkpoints")


def take(step, value, backend):
    state = TrainState(step=step)
    return snapshot({"model.w": value}, state, run_config="seed: 0\n", model_config={"a": 1}, backend=backend)


def value_in(path, backend):
    tensors = {"model.w": torch.zeros(4)}
    load_checkpoint(path, tensors, backend=backend)
    return tensors["model.w"].tolist()


def saver_into(folder, backend, *, keep=None, asynchronous=True):
    return Saver(folder, backend=backend, keep=keep, asynchronous=asynchronous)


def train(config):
    trainer = Trainer(from_dict(RunConfig, config))
    try:
        trainer.train()
    finally:
        trainer.close()
    return {row["step"]: row["loss"] for row in read_rows(trainer.output_dir / "metrics.jsonl") if "loss" in row}


def full_disk_from_step(step, monkeypatch):
    write = Saver._write

    def failing(self, content, copy_seconds):
        if content.step >= step:
            monkeypatch.setattr("coda_pretrain.checkpoints.saver.write_durably", full)
        return write(self, content, copy_seconds)

    monkeypatch.setattr(Saver, "_write", failing)


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_training_goes_on_during_a_save_which_holds_the_values_of_its_step(tmp_path, backend, monkeypatch):
    go_on, write = threading.Event(), Saver._write
    monkeypatch.setattr(Saver, "_write", lambda *arguments: (go_on.wait(), write(*arguments))[1])
    value, saver = torch.full((4,), 2.0), saver_into(tmp_path, backend)
    saver.save(lambda: take(2, value, backend))
    value.fill_(3.0)  # the next step
    assert committed_checkpoints(tmp_path) == []
    go_on.set()
    saver.wait()
    assert value_in(committed_checkpoints(tmp_path)[0], backend) == [2.0] * 4
    saver.close()


def test_saves_follow_each_other_and_only_the_newest_are_kept(tmp_path, backend):
    saver = saver_into(tmp_path, backend, keep=2)
    for step in (1, 2, 3):
        saver.save(lambda step=step: take(step, torch.full((4,), float(step)), backend))
    saver.close()
    assert [value_in(path, backend)[0] for path in committed_checkpoints(tmp_path)] == [2.0, 3.0]


def test_a_failed_save_ends_the_run_at_the_next_step_and_the_one_before_stays_valid(tmp_path, run_config, monkeypatch):
    full_disk_from_step(4, monkeypatch)
    config = merge(run_config, {"max_steps": 400, "checkpoint": {"every": 2}})
    with pytest.raises(CheckpointError, match=r"step-00000004 could not be saved: .*No space left.*newest valid.*0002"):
        train(config)
    assert [path.name for path in committed_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002"]


def test_a_save_that_fails_at_the_end_of_the_run_fails_the_run(run_config, monkeypatch):
    full_disk_from_step(6, monkeypatch)
    with pytest.raises(CheckpointError, match="step-00000006 could not be saved"):
        train(run_config)


def test_a_folder_that_is_not_shared_by_all_machines_is_no_checkpoint(tmp_path, backend, monkeypatch):
    monkeypatch.setattr(
        "coda_pretrain.checkpoints.saver.files_below", lambda path: {}
    )  # as if another host had written the file
    saver = saver_into(tmp_path, backend, asynchronous=False)
    message = r"tensors/__0_0\.distcp of other processes cannot be seen from here: checkpoint\.folder must be"
    with pytest.raises(CheckpointError, match=message):
        saver.save(lambda: take(1, torch.ones(4), backend))
    assert committed_checkpoints(tmp_path) == []
    saver.close()


def test_a_store_behind_a_url_keeps_every_promise_of_a_folder(store, backend):
    saver = saver_into(store, backend, keep=3, asynchronous=False)
    for step in (1, 2, 3):
        saver.save(lambda step=step: take(step, torch.full((4,), float(step)), backend))
    first, second, third = committed_checkpoints(store)
    assert (first.name, value_in(first, backend)) == ("step-00000001", [1.0] * 4)
    (third / MARKER).unlink()
    assert checkpoint_to_resume("auto", store) == second
    data = second / "tensors" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.fs.pipe_file(data.path, bytes(content))
    assert checkpoint_to_resume("auto", store) == second  # the sizes are right; who loads it looks at the content
    with pytest.raises(ValueError, match=rf"another hash .*continue from it with checkpoint\.resume={first}"):
        value_in(second, backend)
    set_aside_later_checkpoints(store, 1)
    assert committed_checkpoints(store) == [first]
    assert (store / "step-00000002.abandoned" / MARKER).is_file()
    assert checkpoint_to_resume(str(first), store) == first
    saver.close()


def test_a_failed_save_to_a_store_leaves_nothing_there(store, backend, monkeypatch):
    saver = saver_into(store, backend)
    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    saver.save(lambda: take(1, torch.ones(4), backend))
    with pytest.raises(CheckpointError, match="No space left.*the run has no valid one"):
        saver.wait()
    assert not (store / "step-00000001").exists()
    saver.close()


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_run_whose_checkpoints_are_behind_a_url_resumes_and_exports(tmp_path, run_config, scheme):
    url = f"memory://{uuid.uuid4().hex}" if scheme == "memory" else f"file://{tmp_path}/store"
    constant = merge(run_config, {"schedule": {"name": "constant"}})
    whole = train({**constant, "output_dir": str(tmp_path / "whole")})
    config = merge(constant, {"checkpoint": {"every": 2, "keep": 1, "folder": url}})
    train({**config, "max_steps": 4})
    resumed = train({**config, "output_dir": str(tmp_path / "elsewhere")})  # another machine: only the URL is shared
    assert resumed == {step: loss for step, loss in whole.items() if step > 4}
    assert [path.name for path in committed_checkpoints(place_of(url))] == ["step-00000006"]
    assert fault_of(committed_checkpoints(place_of(url))[0]) is None
    assert export_main(["--checkpoint_dir", url, "--output_dir", str(tmp_path / "export")]) == 0
    assert (tmp_path / "export" / "model.safetensors").is_file()


def test_urls_that_cannot_be_served_are_refused_with_the_reason(run_config, monkeypatch):
    with pytest.raises(ValueError, match=r"output_dir must be a local folder.*checkpoint\.folder=gs://bucket/run"):
        Trainer(from_dict(RunConfig, {**run_config, "output_dir": "gs://bucket/run"}))
    with pytest.raises(ValueError, match="nothing://x is no folder and no URL that fsspec knows"):
        Trainer(from_dict(RunConfig, merge(run_config, {"checkpoint": {"folder": "nothing://x"}})))
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match="needs a package that is not installed.*gs:// is served by gcsfs"):
        place_of("gs://bucket/run")


def other_process(monkeypatch, backend, *, token="other", fault=None):
    """Make `backend` one of two processes, of which the other answers with `token` and then with `fault`."""
    answers = iter([token, fault, fault])

    def gather(found, own, group):
        found[:] = [own, next(answers)]

    monkeypatch.setattr(backend, "_saving_group", object())
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    monkeypatch.setattr("coda_pretrain.checkpoints.saver.SEEN_WITHIN_S", 0.0)


def test_a_checkpoints_folder_is_tried_before_training_and_nothing_stays_in_it(tmp_path, backend, store):
    check_folder(tmp_path / "run" / "checkpoints", backend=backend)
    check_folder(store, backend=backend)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"checkpoint.folder must be a folder or URL that every process can write"):
        check_folder(tmp_path / "file" / "checkpoints", backend=backend)


def test_a_folder_that_another_process_does_not_share_is_refused(tmp_path, backend, monkeypatch):
    other_process(monkeypatch, backend)
    with pytest.raises(ValueError, match="what process 1 wrote there cannot be seen by process 0"):
        check_folder(tmp_path, backend=backend)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".seen-other").write_text("")
    other_process(monkeypatch, backend)
    check_folder(tmp_path, backend=backend)
    other_process(monkeypatch, backend, fault="PermissionError: no")
    with pytest.raises(ValueError, match="process 1: PermissionError: no"):
        check_folder(tmp_path, backend=backend)
