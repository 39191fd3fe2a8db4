"""Score cards: `python -m coda_eval.report RESULTS_DIR --output scores.json` (or `scores.md`).

One entry per task and metric of every `results_*.json` in the folder: score, number of documents, standard error,
Wilson interval, the settings that made it and what its answers cost, the versions, and the isolation level.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from coda_eval.records import FILE, Record, read_records
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
    paths = list(Path(folder).rglob("results_*.json"))
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


def _cards_of(path: Path, folder: Path) -> list[dict[str, Any]]:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        config, results = run["config"], run["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a results file of lm-eval: {error!r}") from error
    cards = []
    records = defaultdict(list)
    for record in read_records(folder) if (folder / FILE).is_file() else ():
        records[record.task].append(record)
    for task, metrics in results.items():
        counts = run.get("n-samples", {}).get(task)
        cost = _cost_of(records[task]) if records[task] else {}
        per_forward = tokens_per_forward(cost.get("new_tokens"), cost.get("forwards"))
        of_task = run.get("coda_eval", {}).get("tasks", {}).get(task, {})
        for key, value in metrics.items():
            name, _, stage = key.partition(",")
            if not isinstance(value, (int, float)) or name.endswith("_stderr") or name in DETAILS or not stage:
                continue
            stderr = metrics.get(f"{name}_stderr,{stage}")
            count = counts["effective"] if counts else None
            # Only shares of documents have a binomial interval; groups and unbounded metrics have none.
            interval = wilson_interval(value, count) if count and 0.0 <= value <= 1.0 else None
            cards.append(
                {
                    "task": task,
                    "metric": name,
                    "filter": stage,
                    "score": value,
                    "n": count,
                    "stderr": stderr if isinstance(stderr, (int, float)) else None,
                    "wilson95": interval and [round(bound, 6) for bound in interval],
                    "bootstrap95": of_task.get("bootstrap95", {}).get(key),
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
        cost.update(counted)
    return {name: round(value, 3) for name, value in cost.items()}


def _provenance(run: dict[str, Any], config: dict[str, Any], task: str, path: Path) -> dict[str, Any]:
    """Which run a score came from, in enough detail to repeat it."""
    names = ("model", "model_args", "generation_settings", "gen_kwargs", "batch_size", "limit", "torch_seed", "device")
    versions = ("lm_eval_version", "transformers_version", "git_hash", "chat_template_sha")
    facts, seconds = run.get("coda_eval", {}), run.get("total_evaluation_time_seconds")
    of_task = facts.get("tasks", {}).get(task, {})
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
        "task_generation_kwargs": run.get("configs", {}).get(task, {}).get("generation_kwargs"),
        "task_version": run.get("versions", {}).get(task),
        "task_hash": run.get("task_hashes", {}).get(task),
        "versions": {name: run.get(name) for name in versions},
        "seconds": seconds and float(seconds),
        "file": path.name,
    }


def as_markdown(cards: list[dict[str, Any]]) -> str:
    """The cards as a table, shares in percent with their Wilson interval."""
    lines = [
        "| task | metric | score | 95 % interval | n | outcomes | isolation | settings |",
        "|---|---|---:|---|---:|---|---|---|",
    ]
    for card in cards:
        low_high = card["wilson95"]
        shown = f"{100 * card['score']:.1f} %" if low_high else f"{card['score']:.4f}"
        interval = f"{100 * low_high[0]:.1f} - {100 * low_high[1]:.1f} %" if low_high else ""
        settings = card["settings"]["generation_settings"] or {}
        text = ", ".join(f"{name}={value}" for name, value in settings.items())
        cells = (
            card["task"],
            card["metric"],
            shown,
            interval,
            card["n"] or "",
            card["outcomes"] or "",
            card["isolation"] or "",
            text,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


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
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(table if args.output.suffix == ".md" else json.dumps(cards, indent=2) + "\n")
    print(table, end="")


if __name__ == "__main__":
    run_program(main)
