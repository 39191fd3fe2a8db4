"""A real autoregressive model through every room: `python benchmarks/real_model.py PATH.gguf|FOLDER [--limit N]`.

The stages, each in a process of its own with a time limit; what one measured stays if another fails:

- `source`: the weights in float32, as transformers reads them (GGUF is dequantised; needs the package gguf).
- `conversion`: `save_hf_model.py` with blocks of one token; logits against transformers' own class.
- `greedy`: 64 tokens against transformers' own, with the cache and without.
- `humaneval`, `mbpp`: pass@1 by transformers' own class (`hf`) and by blocks of one token (`coda`), greedy, with the
  model's chat template; the roads take turns, and every answer that differs is looked into.
- `infilling`: HumanEval's single lines, by the model's own fill-in-the-middle tokens.
- `serving`: tokens a second of the server, one client alone and several at once.
- `adaptation`: on a GPU, the time it has; infilling before and after.

The same command goes on where it stopped: a stage is done again where the model's files, its settings or its limit
changed, and problems that were answered sixteen by sixteen are not answered again. The report is `real_model.json` and
`real_model.md` in `--output`; other models that it holds stay. `CODA_EVAL_DATA` says where the problems are.
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
ROOMS = (REPOSITORY, *(REPOSITORY / room for room in ("pre-train", "evaluation", "serving")), HERE)
os.environ.setdefault("USE_TORCH_XLA", "0")  # read when transformers is imported
sys.path[:0] = map(str, ROOMS)  # this checkout's, before any that is installed

from gpu.__main__ import LONGEST_START, STOPS_BEFORE, Worker, when_told  # noqa: E402
from real.results import Results  # noqa: E402
from real.stages import STAGES  # noqa: E402
from real.task import BATCH_SIZE, NEW_TOKENS, Task  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; the status is 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="benchmarks/real_model.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, help="a GGUF file, or a Hugging Face folder")
    parser.add_argument("--name", help="in the report (default: the file's or folder's)")
    parser.add_argument("--work", type=Path, help="folder of all that is made (default: runs/real_model/NAME)")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the report (default: benchmarks)")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"some of {','.join(STAGES)} (default: all)")
    parser.add_argument("--again", default="", help="stages that are done again although nothing changed")
    parser.add_argument("--limit", type=int, help="problems of each benchmark (default: all)")
    parser.add_argument("--time_limit", default="", help="seconds of stages: humaneval=7200,mbpp=3600")
    parser.add_argument("--worker", choices=list(STAGES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names, again = some_stages(parser, "stages", options.stages), some_stages(parser, "again", options.again)
    limits = read_limits(parser, options.time_limit)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit must be a positive integer, got {options.limit}")
    options.model = options.model.resolve()
    if options.model.suffix == ".gguf" and options.model.is_file():
        if importlib.util.find_spec("gguf") is None:
            parser.error("a GGUF file needs the package gguf: pip install 'gguf>=0.17' (the extra gguf)")
    elif not (options.model / "config.json").is_file():
        parser.error(f"the model must be a .gguf file or a folder with a config.json, got {str(options.model)!r}")
    name = options.name or options.model.stem
    work = (options.work or REPOSITORY / "runs" / "real_model" / name).resolve()
    key = hash_of(options.model)
    if options.worker:
        do(options.worker, Task(options.model, work, options.limit, key))
        return 0
    results = Results(name, work, options.output, key)
    if "source" not in names and results.stage("source").get("outcome") != "done":
        parser.error(f"--stages must hold source, which makes the weights that the others read, until {work} has them")
    environment = os.pathsep.join(map(str, ROOMS))
    os.environ["PYTHONPATH"] = environment + os.pathsep + os.environ.get("PYTHONPATH", "")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "USE_TORCH_XLA": "0"}
    command = [sys.executable, str(HERE / "real_model.py"), str(options.model), "--work", str(work), "--name", name]
    command += ["--limit", str(options.limit)] if options.limit else []
    for stage in (stage for stage in STAGES if stage in names):
        stamp = stamp_of(stage, key, options.limit)
        if stage not in again and results.is_done(stage, stamp):
            print(f"== {stage}: done before", flush=True)
            continue
        run(stage, [*command, "--worker", stage], results, stamp, limits.get(stage, STAGES[stage].limit_s))
    results.write()
    failed = [stage for stage in names if results.stage(stage).get("outcome") != "done"]
    print(f"{options.output / 'real_model.md'}: {', '.join(failed) or 'nothing'} failed")
    return int(bool(failed))


def some_stages(parser: argparse.ArgumentParser, option: str, text: str) -> list[str]:
    """Names of stages."""
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"--{option} must be some of {','.join(STAGES)}, got {','.join(unknown)}")
    return names


def read_limits(parser: argparse.ArgumentParser, text: str) -> dict[str, float]:
    """Seconds by stage."""
    limits = {}
    for part in (part for part in text.split(",") if part):
        name, _, value = part.partition("=")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = 0.0
        if name not in STAGES or not limits[name] > STOPS_BEFORE:
            parser.error(
                f"--time_limit must be STAGE=SECONDS with more than {STOPS_BEFORE:.0f} s, separated by commas, for "
                f"{','.join(STAGES)}, got {part!r}"
            )
    return limits


def hash_of(model: Path) -> str:
    """Hash of the content of a file, or of the names and content of a folder's files."""
    files = [model] if model.is_file() else sorted(path for path in model.iterdir() if path.is_file())
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            of_file = hashlib.file_digest(content, "sha256").hexdigest()
        whole.update(f"{file.name if model.is_dir() else ''} {of_file}\n".encode())
    return whole.hexdigest()[:16]


def stamp_of(stage: str, key: str, limit: int | None) -> str:
    """Hash of what a stage's results depend on, the code aside."""
    facts: list[Any] = [key, STAGES[stage].function, STAGES[stage].arguments]
    facts += [limit, BATCH_SIZE, NEW_TOKENS] if STAGES[stage].is_limited else []
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def run(stage: str, command: list[str], results: Results, stamp: str, limit: float) -> None:
    """Run a stage in its process, which is killed when its time is up or this one ends."""
    results.start(stage, stamp, limit)
    worker = Worker(stage, command, results)

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        worker.ready.wait(LONGEST_START)
        worker.run(limit)
    finally:
        worker.kill()
        signal.signal(signal.SIGTERM, before)


def do(stage: str, task: Task) -> None:
    """Do a stage in this process until the time of `time.monotonic` that stands on the standard input."""
    module, _, function = STAGES[stage].function.partition(":")
    work = getattr(importlib.import_module(f"real.{module}"), function)
    when_told(lambda end: work(Task(task.model, task.work, task.limit, task.key, end), *STAGES[stage].arguments))


if __name__ == "__main__":
    sys.exit(main())
