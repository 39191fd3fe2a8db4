"""Checkpoints: whole or absent, verified, kept when a later one fails."""

import errno
import json
import logging

import pytest
import torch

from coda_pretrain.checkpoints.checkpoint import (
    MARKER,
    CheckpointError,
    TrainState,
    checkpoint_to_resume,
    committed_checkpoints,
    fault_of,
    intact_checkpoint,
    load_checkpoint,
    remove_old_checkpoints,
)
from coda_pretrain.checkpoints.saver import snapshot, write_checkpoint
from coda_pretrain.devices.config import HardwareConfig
from coda_pretrain.devices.torch_backend import TorchBackend
from coda_pretrain.places import place_of, sha256_of


@pytest.fixture
def backend():
    return TorchBackend(HardwareConfig())


@pytest.fixture
def save(tmp_path, backend):
    def save(step, value=1.0):
        tensors = {"model.weight": torch.full((3, 4), value), "optim.weight.exp_avg": torch.full((3, 4), -value)}
        state = TrainState(step=step, tokens=7 * step, row_loss=0.1 * step)
        texts = {"run_config": "seed: 0\n", "model_config": {"vocab_size": 3}}
        return write_checkpoint(tmp_path, snapshot(tensors, state, **texts, backend=backend), backend=backend)

    return save


def restored(path, backend):
    tensors = {"model.weight": torch.zeros(3, 4), "optim.weight.exp_avg": torch.zeros(3, 4)}
    return tensors, load_checkpoint(path, tensors, backend=backend)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_what_is_saved_comes_back_exactly(save, backend):
    path = save(12, value=0.1)
    assert path.name == "step-00000012"
    tensors, state = restored(path, backend)
    assert (tensors["model.weight"] == torch.tensor(0.1)).all()
    assert (tensors["optim.weight.exp_avg"] == torch.tensor(-0.1)).all()
    assert state == TrainState(step=12, tokens=84, row_loss=0.1 * 12)
    assert (path / "config.yaml").read_text() == "seed: 0\n"


def test_the_random_state_comes_back(save, backend):
    path = save(1)
    expected = torch.rand(3)
    torch.rand(100)
    restored(path, backend)
    assert torch.equal(torch.rand(3), expected)


def test_a_full_disk_fails_the_save_and_leaves_the_previous_checkpoint(save, backend, tmp_path, monkeypatch):
    first = save(1, value=1.0)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    with pytest.raises(CheckpointError, match=r"step-00000002 could not be saved: .*No space left.*newest valid.*0001"):
        save(2)
    monkeypatch.undo()
    assert not (tmp_path / "step-00000002").exists()
    assert checkpoint_to_resume("auto", tmp_path) == first
    assert (restored(first, backend)[0]["model.weight"] == 1.0).all()


def test_a_full_disk_at_the_commit_fails_the_save_too(save, tmp_path, monkeypatch):
    first = save(1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("coda_pretrain.places.os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(2)
    assert committed_checkpoints(tmp_path) == [first]


@pytest.mark.parametrize("file", ["tensors/.metadata", "state.json", "config.yaml"])
def test_a_changed_byte_is_found_and_the_previous_checkpoint_offered(save, tmp_path, file):
    first, second = save(1), save(2)
    flip_a_byte(second / file)
    message = rf"step-00000002 is corrupt: {file} has another hash .*intact one is .*checkpoint\.resume={first}"
    with pytest.raises(ValueError, match=message):
        checkpoint_to_resume("auto", tmp_path)
    assert checkpoint_to_resume(str(first), tmp_path) == first


def test_a_changed_byte_of_tensors_is_found_by_who_loads_them(save, backend, tmp_path, monkeypatch):
    first, second = save(1), save(2)
    flip_a_byte(second / "tensors" / "__0_0.distcp")
    message = r"step-00000002 is corrupt: tensors/__0_0.distcp has another hash .*checkpoint\.resume="
    with pytest.raises(ValueError, match=f"{message}{first}"):
        intact_checkpoint(second)
    assert checkpoint_to_resume("auto", tmp_path) == second
    for path in (second, place_of(f"file://{second}")):
        with pytest.raises(ValueError, match=message):
            restored(path, backend)


def test_each_file_of_tensors_is_hashed_once_by_a_process_that_resumes(save, backend, tmp_path, monkeypatch):
    path, hashed = save(1), []
    monkeypatch.setattr(
        "coda_pretrain.checkpoints.checkpoint.sha256_of", lambda file: hashed.append(file.name) or sha256_of(file)
    )
    checkpoint_to_resume("auto", tmp_path)
    assert not [name for name in hashed if name.endswith(".distcp")]
    restored(path, backend)
    assert [name for name in hashed if name.endswith(".distcp")] == ["__0_0.distcp"]


def test_missing_and_truncated_files_are_named(save):
    path = save(1)
    (path / "tensors" / "__0_0.distcp").write_bytes(b"short")
    assert "tensors/__0_0.distcp has 5 bytes instead of" in fault_of(path)
    (path / "tensors" / "__0_0.distcp").unlink()
    assert fault_of(path) == "tensors/__0_0.distcp is missing"
    (path / MARKER).write_text("{")
    assert fault_of(path) == f"its {MARKER} cannot be read"
    with pytest.raises(ValueError, match="there is no intact one beside it"):
        intact_checkpoint(path)


def test_an_unfinished_save_is_ignored_with_a_warning(save, tmp_path, caplog):
    first, second = save(1), save(2)
    (second / MARKER).unlink()
    with caplog.at_level(logging.INFO):
        assert checkpoint_to_resume("auto", tmp_path) == first
    assert f"{second} was never finished and is ignored" in caplog.text
    assert f"resume=auto takes {first}" in caplog.text


def test_resume_never_refuses_a_folder_with_checkpoints(save, tmp_path):
    assert checkpoint_to_resume("never", tmp_path) is None
    save(5)
    with pytest.raises(ValueError, match=r"checkpoint\.resume is 'never', but .* up to step-00000005"):
        checkpoint_to_resume("never", tmp_path)


def test_a_resume_path_must_exist(tmp_path):
    message = r"checkpoint\.resume must be auto, latest, never, a step or a checkpoint folder, got 'newest'"
    with pytest.raises(ValueError, match=message):
        checkpoint_to_resume("newest", tmp_path)


def test_resume_takes_the_latest_or_a_step_and_says_what_there_is(save, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\.resume is 'latest', but .* has no finished checkpoint"):
        checkpoint_to_resume("latest", tmp_path)
    first, second = save(3), save(6)
    assert checkpoint_to_resume("latest", tmp_path) == second
    assert checkpoint_to_resume(3, tmp_path) == first
    with pytest.raises(ValueError, match=r"checkpoint\.resume is step 4, but .* has the steps: 3, 6"):
        checkpoint_to_resume(4, tmp_path)


def test_only_the_newest_checkpoints_are_kept(save, tmp_path):
    for step in (1, 2, 3, 100000000):
        save(step)
    (tmp_path / "step-00000002" / MARKER).unlink()
    remove_old_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-100000000"]
    remove_old_checkpoints(tmp_path, keep=None)
    assert len(committed_checkpoints(tmp_path)) == 2


def test_a_save_replaces_what_lies_at_its_place(save, tmp_path, backend):
    save(1, value=1.0)
    path = save(1, value=2.0)
    assert (restored(path, backend)[0]["model.weight"] == 2.0).all()
    assert fault_of(path) is None


@pytest.mark.parametrize(
    "tensors",
    [{"model.weight": torch.zeros(3, 5)}, {"model.other": torch.zeros(3, 4)}],
)
def test_tensors_that_do_not_fit_are_refused(save, backend, tensors):
    path = save(1)
    with pytest.raises(ValueError, match="does not fit this run's model and optimizer"):
        load_checkpoint(path, tensors, backend=backend)


def test_the_marker_lists_every_file(save):
    path = save(1)
    files = {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()} - {MARKER}
    assert json.loads((path / MARKER).read_text())["files"].keys() == files
