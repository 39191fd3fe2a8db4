"""Score cards: `python -m coda_eval report RESULTS_DIR --output scores.json` (or `scores.md`).

One entry per task and metric of every `results_*.json` in the folder: score, number of documents, standard error,
Wilson interval, the settings that made it and what its answers cost, the versions, and the isolation level.
"""

import argparse
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from coda_eval.output import markdown_table, shown, write_output
from coda_eval.records import FILE, Record, is_number, read_records
from CoDALanguageModel.config_fields import is_finite
from CoDALanguageModel.cost import tokens_per_forward
from CoDALanguageModel.errors import UserError, run_program
from CoDALanguageModel.intervals import wilson_interval
from CoDALanguageModel.run_files import write_whole

DETAILS = ("isolation", "timeouts", "outcomes")
"""Metrics that describe a run and are no scores."""


def score_cards(folder: str | Path) -> list[dict[str, Any]]:
    """Every score below `folder`, oldest run first.

    Raises:
        UserError: there is no results file, or one is not lm-eval's.
    """
    paths = list(Path(folder).rglob("results_*.json")) if os.path.isdir(folder) else []
    if not paths:
        raise UserError(f"no results_*.json in {str(folder)!r}: give the folder of --output_path")
    return cards_of(paths)


def cards_of(results: Iterable[Path]) -> list[dict[str, Any]]:
    """Every score of results files, oldest first; of a task that a run's folder has several results of, the newest.

    Raises:
        UserError: one is not lm-eval's.
    """
    cards = {}
    for path in sorted(results, key=lambda path: path.name):
        folder = _run_folder(path)
        for card in _cards_of(path, folder):
            key = folder, card["task"], card["metric"], card["filter"]
            cards.pop(key, None)
            cards[key] = card
    return list(cards.values())


def _run_folder(path: Path) -> Path:
    """The folder of the run that a results file is of: it holds the records."""
    return next((folder for folder in path.parents[:2] if (folder / FILE).is_file()), path.parent)


_BY_TASK = ("n-samples", "configs", "higher_is_better")
_MAY_BE = ("coda_eval", "versions", "task_hashes", *_BY_TASK)
"""Objects of a results file that it need not have; the former have an object for each task."""


def _read_results(path: Path) -> dict[str, Any]:
    """What a results file holds, with all of its objects.

    Raises:
        UserError: it is not lm-eval's.
    """
    wrong = f"{path} is not a results file of lm-eval"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{wrong}: {error!r}") from error

    def check(holds: bool, name: str, what: str, value: Any) -> None:
        if not holds:
            raise UserError(f"{wrong}: {name} must be {what}, got {json.dumps(value)[:80]}")

    check(isinstance(found, dict), "it", "an object", found)
    run: dict[str, Any] = {name: {} for name in _MAY_BE} | found
    for name in ("config", "results", *_MAY_BE):
        check(isinstance(run.get(name), dict), name, "an object", run.get(name))
    of_tasks = {name: run[name] for name in ("results", *_BY_TASK)}
    of_tasks["coda_eval.tasks"] = run["coda_eval"].setdefault("tasks", {})
    for name, tasks in of_tasks.items():
        is_whole = isinstance(tasks, dict) and all(isinstance(of_task, dict) for of_task in tasks.values())
        check(is_whole, name, "an object of objects", tasks)
    for task, counts in run["n-samples"].items():
        count = counts.get("effective")
        check(type(count) is int and is_finite(count), f"n-samples.{task}.effective", "a whole number", count)
    for task, facts in run["coda_eval"]["tasks"].items():
        bounds = facts.get("bootstrap95") or {}
        check(isinstance(bounds, dict), f"coda_eval.tasks.{task}.bootstrap95", "an object or null", bounds)
    settings, seconds = run["config"].get("generation_settings"), run.get("total_evaluation_time_seconds")
    check(isinstance(settings, dict | None), "config.generation_settings", "an object or null", settings)
    try:
        run["total_evaluation_time_seconds"] = None if seconds is None else float(seconds)
    except (TypeError, ValueError, OverflowError):
        check(False, "total_evaluation_time_seconds", "a number", seconds)
    return run


def _cards_of(path: Path, folder: Path) -> list[dict[str, Any]]:
    run = _read_results(path)
    config, results = run["config"], run["results"]
    cards = []
    records = defaultdict(list)
    for record in read_records(folder) if (folder / FILE).is_file() else ():
        records[record.task].append(record)
    for task, metrics in results.items():
        counts = run["n-samples"].get(task)
        cost = _cost_of(records[task]) if records[task] else {}
        per_forward = tokens_per_forward(cost.get("new_tokens"), cost.get("forwards"))
        of_task = run["coda_eval"]["tasks"].get(task, {})
        for key, value in metrics.items():
            name, _, stage = key.partition(",")
            if not is_number(value) or name.endswith("_stderr") or name in DETAILS or not stage:
                continue
            stderr = metrics.get(f"{name}_stderr,{stage}")
            count = counts["effective"] if counts else None
            higher_is_better = run["higher_is_better"].get(task, {}).get(name)
            # Only shares of documents have a binomial interval; groups, losses and unbounded metrics have none.
            is_share = count and 0.0 <= value <= 1.0 and higher_is_better is not False
            interval = wilson_interval(value, count) if is_share else None
            cards.append(
                {
                    "task": task,
                    "metric": name,
                    "filter": stage,
                    "score": value,
                    "n": count,
                    "stderr": stderr if is_number(stderr) else None,
                    "higher_is_better": higher_is_better,
                    "wilson95": interval and [round(bound, 6) for bound in interval],
                    "bootstrap95": (of_task.get("bootstrap95") or {}).get(key),
                    "likelihood_stderr": of_task.get("likelihood_stderr"),
                    **{detail: metrics.get(f"{detail},{stage}") for detail in DETAILS},
                    "cut": num_cut(records[task]),
                    "cost": cost or None,
                    "forwards": cost.get("forwards"),
                    "tokens_per_forward": per_forward and round(per_forward, 4),
                    "judging_s": cost and round(sum(record.seconds or 0.0 for record in records[task]), 3) or None,
                    **_provenance(run, config, task, path),
                }
            )
    return cards


def num_cut(records: Sequence[Record]) -> int | None:
    """Answers that may have been cut, as nothing ended them before their longest; None where none says it."""
    reasons = [record.finish_reason for record in records]
    return reasons.count("length") if any(reasons) else None


def _cost_of(records: Sequence[Record]) -> dict[str, float]:
    """What the answers of a task cost together."""
    cost: Counter[str] = Counter(answers=len(records))
    for record in records:
        cost.update({name: getattr(record, name) or 0 for name in ("new_tokens", "forwards")})
        counted = dict(record.cost or {})
        for name in ("forwards", "row_forwards", "answer_tokens", "tokens_per_forward"):  # said already, and a ratio
            counted.pop(name, None)
        cost.update({name: value for name, value in counted.items() if value is not None})
    return {name: round(value, 3) for name, value in cost.items()}


def _provenance(run: dict[str, Any], config: dict[str, Any], task: str, path: Path) -> dict[str, Any]:
    """Which run a score came from, in enough detail to repeat it."""
    # Not `device`: lm-eval's default is "cuda:0", on machines without a GPU too; which one it was stands beside them.
    names = ("model", "model_args", "generation_settings", "gen_kwargs", "batch_size", "limit", "torch_seed")
    versions = ("lm_eval_version", "transformers_version", "git_hash", "chat_template_sha")
    facts = run["coda_eval"]
    of_task = facts["tasks"].get(task, {})
    return {
        "settings": {name: config.get(name) for name in names},
        "resolved": of_task.get("settings"),
        "hashes": {
            **{name: facts.get(name) for name in ("weights", "tokenizer", "code")},
            "data": of_task.get("data"),
        },
        **{name: facts.get(name) for name in ("dtype", "device", "world_size", "selfcheck")},
        "seed": config.get("torch_seed"),
        "batch_size": config.get("batch_size"),
        "task_generation_kwargs": run["configs"].get(task, {}).get("generation_kwargs"),
        "task_version": run["versions"].get(task),
        "task_hash": run["task_hashes"].get(task),
        "versions": {name: run.get(name) for name in versions},
        "seconds": run["total_evaluation_time_seconds"],
        "file": path.name,
    }


def as_markdown(cards: list[dict[str, Any]]) -> str:
    """The cards as a table, shares in percent with their Wilson interval."""
    rows = []
    for card in cards:
        low_high = card["wilson95"]
        score = shown(card["score"], low_high is not None)
        interval = f"{100 * low_high[0]:.1f} - {100 * low_high[1]:.1f} %" if low_high else ""
        settings = ", ".join(
            f"{name}={value}" for name, value in (card["settings"]["generation_settings"] or {}).items()
        )
        details = (card[name] or "" for name in ("n", "outcomes", "isolation"))
        rows.append([card["task"], card["metric"], score, interval, *details, settings])
    header = ["task", "metric", "score", "95 % interval", "n", "outcomes", "isolation", "settings"]
    return markdown_table(header, rows)


def write_scores(results: Sequence[Path], target: Path) -> None:
    """Write the cards of results files to `target`."""
    write_whole(target, json.dumps(cards_of(results), indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the score cards of a folder as JSON or Markdown, and print the Markdown."""
    parser = argparse.ArgumentParser(prog="python -m coda_eval report", description="Score cards of evaluation runs.")
    parser.add_argument("results_dir", help="folder that --output_path named")
    parser.add_argument("--output", type=Path, help="file to write: .json or .md")
    args = parser.parse_args(argv)
    if args.output is not None and args.output.suffix not in (".json", ".md"):
        parser.error(f"--output must end in .json or .md, got {str(args.output)!r}")
    try:
        cards = score_cards(args.results_dir)
    except UserError as error:
        parser.error(str(error))
    table = as_markdown(cards)
    if args.output is not None:
        write_output(args.output, table if args.output.suffix == ".md" else json.dumps(cards, indent=2) + "\n")
    print(table, end="")


if __name__ == "__main__":
    run_program(main)
