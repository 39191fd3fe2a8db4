"""Checkpoints and what a run is: which folder is whole, which one a run continues from, and with what.

A checkpoint is written aside (`.saving/checkpoint-N`), gets `complete.json` with the size of each of its files,
and is then renamed, so a folder of that name is whole. Folders without the marker, of older runs, are looked at file
by file. `run.json` in the output folder says what the run is made of and whether it has finished. Imports neither
torch nor LLaMA-Factory: a run that cannot continue is refused at once.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.run_files import write_whole

logger = logging.getLogger(__name__)

MARKER = "complete.json"
STAGING = ".saving"
RUN_FILE = "run.json"
RUNNING, FINISHED = "running", "finished"
TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
_SHARDED = ("global_step*", "pytorch_model_fsdp_*")
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 20


def write_marker(folder: Path) -> None:
    """Flush every file of `folder` to the disk and list their sizes in `complete.json`, written last."""
    sizes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as content:
            os.fsync(content.fileno())
        sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    write_whole(folder / MARKER, json.dumps({"files": sizes}, indent=1))


def remove(folder: Path) -> None:
    """Remove a folder that may be gone already, or go while it is removed (another process of a shared disk)."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        if folder.exists():
            remove(folder)


def put_in_place(staged: Path, target: Path) -> None:
    """Give a staged checkpoint its name; one of that name, from before, makes room."""
    if target.exists():
        old = staged.with_name(f"old-{target.name}")
        remove(old)
        os.replace(target, old)
        os.replace(staged, target)
        remove(old)
    else:
        os.replace(staged, target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep_newest(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints until `limit` are left; the newest and the `best` one always stay.

    One that is removed loses its name first: a half of it would be newer than whole ones, and kept in place of them.
    """
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    found.sort(key=lambda path: (path.stat().st_mtime, int(path.name.partition("-")[2])))
    kept = {*found[-1:], *([Path(best)] if best else [])}
    surplus = [path for path in found if path not in kept] if limit and limit > 0 else []
    for folder in surplus[: max(0, len(found) - max(limit or 0, len(kept)))]:
        aside = output_dir / STAGING / f"old-{folder.name}"
        aside.parent.mkdir(exist_ok=True)
        remove(aside)
        os.replace(folder, aside)
        remove(aside)


def problem_of(folder: Path, weights_only: bool = False) -> str:
    """What is wrong with a checkpoint, or an empty string.

    Args:
        folder: a `checkpoint-N` folder of the Trainer: plain, LoRA, DeepSpeed or FSDP.
        weights_only: whether the run saves no optimizer (`save_only_model`).
    """
    try:
        if (folder / MARKER).is_file():
            return _differs_from_marker(folder)
        return _looks_broken(folder, weights_only)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        return f"cannot be read: {error}"


def _differs_from_marker(folder: Path) -> str:
    for name, size in json.loads((folder / MARKER).read_text())["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return ""


def _looks_broken(folder: Path, weights_only: bool) -> str:
    """Check a folder that has no marker by what its files say of themselves."""
    state = folder / TRAINER_STATE
    if not state.is_file():
        return f"{TRAINER_STATE} is missing"
    if not isinstance(json.loads(state.read_text()).get("global_step"), int):
        return f"{TRAINER_STATE} has no global_step"
    found = {pattern: list(folder.glob(pattern)) for pattern in (*_WEIGHTS, *_SHARDED, *_OPTIMIZERS)}
    if not any(found[pattern] for pattern in (*_WEIGHTS, *_SHARDED)):
        return "there are no weights"
    if not weights_only and not any(found[pattern] for pattern in _OPTIMIZERS):
        return "there is no optimizer state"
    if not weights_only and found["optimizer.pt"]:
        for name in ("scheduler.pt", "rng_state*.pth"):
            if not list(folder.glob(name)):
                return f"{name} is missing"
    if missing := _missing_shard(folder):
        return missing
    if (folder / "latest").is_file() and not (folder / (folder / "latest").read_text().strip()).is_dir():
        return f"{(folder / 'latest').read_text().strip()} is missing"
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".safetensors" and file.stat().st_size != _safetensors_size(file):
            return f"{name} has {file.stat().st_size} of {_safetensors_size(file)} bytes"
        if file.suffix in (".pt", ".pth", ".bin") and file.name != "training_args.bin" and not zipfile.is_zipfile(file):
            return f"{name} is cut off"
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
    return ""


def weights_problem(folder: Path) -> str:
    """What is wrong with the weights of a model folder, or an empty string; only headers are read."""
    try:
        if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
            return "there are no weights"
        if missing := _missing_shard(folder):
            return missing
        for file in sorted(folder.glob("*.safetensors")):
            if file.stat().st_size != _safetensors_size(file):
                return f"{file.name} has {file.stat().st_size} of {_safetensors_size(file)} bytes"
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        return f"the weights cannot be read: {error}"
    return ""


def _missing_shard(folder: Path) -> str:
    for index in folder.glob("*.index.json"):
        for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            if not (folder / name).is_file():
                return f"{name} is missing"
    return ""


def _safetensors_size(file: Path) -> int:
    """Size that the header of a safetensors file promises, in bytes."""
    with file.open("rb") as content:
        (length,) = struct.unpack("<Q", content.read(8))
        if length > file.stat().st_size:
            return 8 + length
        header = json.loads(content.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)


def newest_whole(output_dir: Path, weights_only: bool = False) -> Path | None:
    """The newest checkpoint that is whole; newer ones that are not are named in the log."""
    numbered = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if path.is_dir()
                and (match := _NAME.fullmatch(path.name))]  # fmt: skip
    for _, folder in sorted(numbered, reverse=True):
        problem = problem_of(folder, weights_only)
        if not problem:
            return folder
        logger.warning("%s is passed over, it is not whole: %s", folder, problem)
    return None


def resolve_start(host: dict[str, Any]) -> dict[str, Any]:
    """Settings with the checkpoint that the run continues from, if there is one.

    Args:
        host: LLaMA-Factory's settings.

    Raises:
        UserError: the checkpoint that was asked for is not whole, or `output_dir` holds another model.
    """
    output_dir, weights_only = Path(host["output_dir"]), bool(host.get("save_only_model"))
    asked = host.get("resume_from_checkpoint")
    if asked and str(asked).lower() != "true":
        problem = problem_of(Path(asked), weights_only) if Path(asked).is_dir() else "there is no such folder"
        if problem:
            near = newest_whole(Path(asked).parent, weights_only) if Path(asked).parent.is_dir() else None
            hint = f"; the newest whole one there is {near}" if near else ""
            raise UserError(f"resume_from_checkpoint={str(asked)!r} cannot be used: {problem}{hint}")
        return host
    host = {key: value for key, value in host.items() if key != "resume_from_checkpoint"}
    if not host.get("do_train") or host.get("overwrite_output_dir") or not output_dir.is_dir():
        return host
    checkpoint = newest_whole(output_dir, weights_only)
    if checkpoint is not None:
        return {**host, "resume_from_checkpoint": str(checkpoint)}
    state = read_run(output_dir).get("state")
    if state != RUNNING and any(path for pattern in _WEIGHTS for path in output_dir.glob(pattern)):
        raise UserError(
            f"output_dir={str(output_dir)!r} already holds a {'finished run' if state else 'model'}; choose another "
            "folder, or set overwrite_output_dir=true to train over it"
        )
    # Nothing to continue from: a first start, or one that was stopped before its first checkpoint was whole.
    return {**host, "overwrite_output_dir": True}


# -- what a run is made of ------------------------------------------------------------------------------------------


def read_run(output_dir: Path) -> dict[str, Any]:
    """`run.json` of an output folder or a checkpoint; empty if there is none."""
    file = output_dir / RUN_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_run(output_dir: Path, state: str, parts: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write `run.json`: whether the run has finished, what it is made of, and all its settings."""
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"state": state, "parts": parts, "settings": settings}, indent=1)
    write_whole(output_dir / RUN_FILE, text)


def is_finished(output_dir: Path, parts: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether exactly this run has finished in `output_dir`."""
    run = read_run(output_dir)
    same = run.get("settings") == json.loads(json.dumps(settings)) and not differences(run.get("parts", {}), parts)
    return run.get("state") == FINISHED and same and not weights_problem(output_dir)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the parts that two runs are made of, one line for each."""
    now = json.loads(json.dumps(now))
    return [
        f"{key}: {_shown(before.get(key))} before, {_shown(now.get(key))} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def refuse_other_run(
    checkpoint: Path, parts: Mapping[str, Any], settings: Mapping[str, Any], accept_changes: bool
) -> None:
    """Compare what a checkpoint was made from with what the run would go on with; other settings are named in the log.

    Raises:
        UserError: something differs and `accept_changes` is off.
    """
    run = read_run(checkpoint)
    changed = differences(run["parts"], parts) if run else []
    if changed and not accept_changes:
        raise UserError(
            f"{checkpoint} was made from something else; choose another output_dir, or set "
            "diffusion.accept_changes=true to go on with it:\n  " + "\n  ".join(changed)
        )
    for line in dict.fromkeys([*changed, *(differences(run["settings"], settings) if run else ())]):
        logger.warning("changes at %s: %s", checkpoint, line)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def file_identity(file: Path, whole: bool) -> str:
    """A hash of a file's content; of its size and of samples of it where it is large and `whole` is not asked."""
    digest, size = hashlib.blake2b(digest_size=16), file.stat().st_size
    with file.open("rb") as content:
        if whole or size <= _SAMPLES * _SAMPLE_BYTES:
            while block := content.read(_SAMPLE_BYTES):
                digest.update(block)
        else:
            for number in range(_SAMPLES):
                content.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(content.read(_SAMPLE_BYTES))
    return f"{size} bytes, {digest.hexdigest()}"


def folder_identity(folder: Path) -> str:
    """A hash of the configuration, tokenizer and weights of a model folder."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".json", ".jinja", ".bin", ".model", ".txt") and file.name not in (
            RUN_FILE, MARKER, TRAINER_STATE, "training_args.bin",
        ) and not file.name.endswith("_results.json"):  # fmt: skip
            digest.update(f"{file.name} {file_identity(file, whole=False)}\n".encode())
    return digest.hexdigest()
