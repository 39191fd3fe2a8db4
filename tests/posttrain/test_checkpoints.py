"""A stop at any point of a save leaves a run that continues, and a run continues only as what it was."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from coda_posttrain import checkpoints
from coda_posttrain.__main__ import main
from coda_posttrain.checkpoints import MARKER, STAGING, keep_newest, newest_whole, problem_of, read_run, resolve_start

REPO = Path(__file__).resolve().parents[2]
CONFIG = REPO / "post-train/LLaMA-Factory/examples/train_full/quickstart.yaml"
DRIVER = """
import json, pathlib, sys
from unittest import mock
from coda_posttrain.__main__ import main
runs = json.loads(sys.argv[1])
import torch
from coda_posttrain import checkpoints, trainer
from transformers import PreTrainedModel, TrainerState

class Stopped(BaseException):
    "What a kill looks like from inside."

def stop_at(target, name, folder):
    original = getattr(target, name)
    def stopping(*args, **kwargs):
        if any(folder in str(argument) for argument in (*args, *kwargs.values())):
            if name in ("save", "save_pretrained"):  # half a file is there
                path = pathlib.Path(args[1])
                path = path / "model.safetensors" if name == "save_pretrained" else path
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"half")
            raise Stopped
        return original(*args, **kwargs)
    return mock.patch.object(target, name, stopping)

TARGETS = {"torch": torch, "model": PreTrainedModel, "state": TrainerState, "trainer": trainer, "os": trainer.os}
log = []
for argv, stop in runs:
    print("RUN", argv, stop, flush=True)
    try:
        if stop:
            with stop_at(TARGETS[stop[0]], stop[1], stop[2]):
                main(argv)
            log.append("not stopped")
        else:
            log.append(main(argv))
    except Stopped:
        log.append("stopped")
pathlib.Path("log.json").write_text(json.dumps(log))
"""
POINTS = [
    ["model", "save_pretrained", "checkpoint-4"],
    ["torch", "save", "optimizer.pt"],
    ["torch", "save", "rng_state"],
    ["state", "save_to_json", "checkpoint-4"],
    ["trainer", "write_marker", "checkpoint-4"],
    ["trainer", "put_in_place", "checkpoint-4"],
    ["os", "replace", "model.safetensors"],
]
"""Where saving is stopped: in a checkpoint's files, before its marker and its name, and in the final folder."""


def settings(model_dir, data_dir, output_dir, **changes) -> list[str]:
    values = {
        "model_name_or_path": model_dir, "dataset_dir": data_dir, "dataset": "train", "output_dir": output_dir,
        "eval_strategy": "no", "per_device_train_batch_size": 8, "max_steps": 4, "save_strategy": "steps",
        "save_steps": 2, **changes,
    }  # fmt: skip
    return [str(CONFIG), *(f"{key}={value}" for key, value in values.items())]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_dir, data_dir, environment) -> Path:
    """One process: an undisturbed run, one that is stopped at every point in turn, one stopped without checkpoints."""
    out = tmp_path_factory.mktemp("saves")
    half = out / "half_model"
    shutil.copytree(model_dir, half)
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    weights = {name: weight.bfloat16() for name, weight in load_file(half / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    whole = ["train", *settings(model_dir, data_dir, out / "whole")]
    stopped = ["train", *settings(model_dir, data_dir, out / "stopped")]
    early = ["train", *settings(model_dir, data_dir, out / "early", save_strategy="no", max_steps=1)]
    narrow = ["train", *settings(half, data_dir, out / "half", max_steps=2)]
    plan = [[whole, None], *([stopped, point] for point in POINTS), [stopped, None]]
    plan += [[early, POINTS[-1]], [early, None], [early, None], [narrow, None]]
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(plan)],
        env=environment, cwd=out, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    (out / "output.txt").write_text(result.stdout + result.stderr)
    return out


def test_a_stop_at_any_point_of_a_save_leaves_a_run_that_continues(runs):
    log = json.loads((runs / "log.json").read_text())
    assert log == [0, *["stopped"] * len(POINTS), 0, "stopped", 0, 0, 0]
    whole, stopped = (load_file(runs / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert not list(runs.glob(f"*/{STAGING}"))


def test_a_finished_run_is_not_repeated(runs):
    assert "this run has already finished in" in (runs / "output.txt").read_text()
    assert read_run(runs / "early")["state"] == "finished"


def test_a_bf16_model_stays_bf16_and_its_checkpoints_keep_what_a_resume_needs(runs):
    assert {weight.dtype for weight in load_file(runs / "half/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((runs / "half/config.json").read_text())["dtype"] == "bfloat16"
    checkpoint = load_file(runs / "half/checkpoint-2/model.safetensors")
    assert {weight.dtype for weight in checkpoint.values()} == {torch.float32}
    assert {weight.dtype for weight in load_file(runs / "whole/model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("marked", [True, False], ids=["with marker", "of an older run"])
def test_every_file_that_is_missing_or_cut_is_found_and_the_checkpoint_before_is_used(runs, tmp_path, marked, caplog):
    for number in (2, 4):
        shutil.copytree(runs / f"whole/checkpoint-{number}", tmp_path / f"checkpoint-{number}")
        if not marked:
            (tmp_path / f"checkpoint-{number}" / MARKER).unlink()
    newest = tmp_path / "checkpoint-4"
    assert newest_whole(tmp_path) == newest
    needed = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    for name in sorted(path.name for path in newest.iterdir()):
        content = (newest / name).read_bytes()
        if name in needed or (marked and name != MARKER):
            (newest / name).unlink()
            assert newest_whole(tmp_path) == tmp_path / "checkpoint-2", name
            (newest / name).write_bytes(content[: len(content) // 2])
            assert newest_whole(tmp_path) == tmp_path / "checkpoint-2", name
            assert f"{newest} is passed over, it is not whole: " in caplog.text
            caplog.clear()
            (newest / name).write_bytes(content)
    assert problem_of(newest) == ""


def test_a_broken_checkpoint_that_is_asked_for_is_refused_with_a_whole_one(runs, tmp_path):
    for number in (2, 4):
        shutil.copytree(runs / f"whole/checkpoint-{number}", tmp_path / f"checkpoint-{number}")
    (tmp_path / "checkpoint-4/optimizer.pt").unlink()
    host = {"output_dir": str(tmp_path / "new"), "do_train": True}
    with pytest.raises(ValueError, match="optimizer.pt is missing; the newest whole one there is .*checkpoint-2"):
        resolve_start({**host, "resume_from_checkpoint": str(tmp_path / "checkpoint-4")})
    with pytest.raises(ValueError, match="checkpoint-9' cannot be used: there is no such folder"):
        resolve_start({**host, "resume_from_checkpoint": str(tmp_path / "checkpoint-9")})


def test_without_a_whole_checkpoint_the_run_starts_again_but_never_over_a_model(runs, tmp_path):
    host = {"output_dir": str(tmp_path), "do_train": True}
    shutil.copytree(runs / "whole/checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2/model.safetensors").unlink()
    assert resolve_start(host) == {**host, "overwrite_output_dir": True}
    shutil.copy(runs / "whole/model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="already holds a model; choose another folder"):
        resolve_start(host)


def test_a_stop_while_an_old_checkpoint_is_removed_costs_no_whole_one(tmp_path, monkeypatch):
    for moment, number in enumerate((20, 3, 10, 4)):  # in the order in which they were written
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "model.safetensors").write_text("weights")
        os.utime(folder, (moment, moment))

    def half(folder):
        if folder.exists():
            next(folder.iterdir()).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "remove", half)
        with pytest.raises(KeyboardInterrupt):
            keep_newest(tmp_path, 2, str(tmp_path / "checkpoint-3"))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-10", "checkpoint-4"}
    assert all(list(path.iterdir()) for path in tmp_path.glob("checkpoint-*"))
    keep_newest(tmp_path, 0, None)
    keep_newest(tmp_path, 3, None)
    keep_newest(tmp_path, 1, str(tmp_path / "checkpoint-3"))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    # Half a checkpoint waits where the next save removes it.
    assert [path.name for path in (tmp_path / STAGING).iterdir()] == ["old-checkpoint-20"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cutoff_len": 200}, "cutoff_len: 256 before, 200 now"),
        ({"diffusion.tail": "none"}, 'diffusion.tail: "eos" before, "none" now'),
        ({"dataset": "held_out"}, "dataset: "),
    ],
)
def test_a_run_continues_only_as_what_it_was(runs, model_dir, data_dir, change, named, capsys):
    assert main(["train", *settings(model_dir, data_dir, runs / "whole", **change)]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "set diffusion.accept_changes=true" in error


def test_changed_data_under_the_same_name_is_noticed(runs, model_dir, data_dir, tmp_path, capsys):
    shutil.copytree(data_dir, tmp_path / "data")
    lines = (tmp_path / "data/train.jsonl").read_text()
    (tmp_path / "data/train.jsonl").write_text(lines.replace("add 3", "sum 3"))
    assert main(["train", *settings(model_dir, tmp_path / "data", runs / "whole")]) == 2
    assert "data train: " in capsys.readouterr().err
    shutil.copytree(model_dir, tmp_path / "model")
    other = load_file(tmp_path / "model/model.safetensors")
    save_file({name: weight + 1 for name, weight in other.items()}, tmp_path / "model/model.safetensors")
    assert main(["train", *settings(tmp_path / "model", data_dir, runs / "whole")]) == 2
    assert "model: " in capsys.readouterr().err


def test_a_model_whose_weights_are_cut_off_is_refused_at_once(model_dir, data_dir, tmp_path, capsys):
    shutil.copytree(model_dir, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["train", *settings(tmp_path / "model", data_dir, tmp_path / "out")]) == 2
    size = (model_dir / "model.safetensors").stat().st_size
    assert f"cannot be used: model.safetensors has {size - 100} of {size} bytes" in capsys.readouterr().err
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3441185608\n")
    assert main(["train", *settings(tmp_path / "model", data_dir, tmp_path / "out")]) == 2
    assert "model.safetensors' is a Git LFS pointer, not the file itself" in capsys.readouterr().err
    weights.unlink()
    assert main(["train", *settings(tmp_path / "model", data_dir, tmp_path / "out")]) == 2
    assert "cannot be used: there are no weights" in capsys.readouterr().err


def test_settings_of_the_run_lie_beside_every_checkpoint(runs):
    for folder in ("whole", "whole/checkpoint-4"):
        run = read_run(runs / folder)
        assert run["settings"]["max_steps"] == 4
        assert run["parts"]["data train"]
        assert yaml.safe_load((runs / folder / "run_config.yaml").read_text())["max_steps"] == 4
