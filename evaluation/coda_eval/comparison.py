"""`python -m coda_eval compare A B`: the answers of two runs to the same documents, side by side.

Scores are paired by task, document and repeat. The interval of a difference resamples documents, never the repeats of
one; answers that are right or wrong get McNemar's exact test as well. What else may explain a difference (template,
data, isolation, settings) is read off the score cards and named.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb, fsum, isfinite
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coda_eval.output import markdown_table, shown, write_output
from coda_eval.records import Record, is_number, read_records
from CoDALanguageModel.config_fields import is_finite
from CoDALanguageModel.cost import tokens_per_forward
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.intervals import bootstrap_interval

Key = tuple[str, str, int]
"""What an answer is known by: task, document (its id as JSON, since 1 and "1" may be two) and repeat."""

RESULTS = frozenset(
    "task metric filter score n stderr wilson95 bootstrap95 likelihood_stderr timeouts outcomes cut cost forwards "
    "tokens_per_forward judging_s seconds file".split()
)
"""Facts of a score card that are what came out."""

OF_THE_MODEL = ("settings.model", "settings.model_args.pretrained", "hashes.weights")
"""Facts of a score card that differ because two models are compared."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A document that one run solves better than the other."""

    task_id: Any
    scores: tuple[float, float]
    """Mean over repeats in A and in B."""

    statuses: tuple[str, str]
    """What became of the answers, with counts where there are several."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the compared answers of one run took; None where the run does not say."""

    new_tokens: int | None
    forwards: int | None
    tokens_per_forward: float | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """One task in both runs."""

    task: str
    documents: int
    answers: int
    """Pairs of answers: more than `documents` where a document has several."""

    left_out: tuple[int, int]
    """Answers of A and of B that the other run does not hold."""

    scores: tuple[float, float]
    difference: float
    """B minus A."""

    interval95: tuple[float, float]
    """Paired bootstrap over documents."""

    discordant: tuple[int, int] | None
    """Documents right in A alone and in B alone; None unless each document has one answer of score 0 or 1."""

    mcnemar_p: float | None
    """Exact, two-sided."""

    worse: list[Change]
    better: list[Change]
    costs: tuple[Cost, Cost]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A fact, beside the model, in which the runs differ."""

    fact: str
    values: tuple[Any, Any]
    tasks: list[str]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs."""

    runs: tuple[str, str]
    tasks: list[TaskComparison]
    differences: list[Difference]


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test: the discordant pairs as throws of a fair coin.

    Source: McNemar 1947, "Note on the sampling error of the difference between correlated proportions or percentages";
    the binomial form instead of his approximation.
    """
    count = only_first + only_second
    tail = sum(comb(count, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**count)


def compare(first: Path, second: Path, *, common: bool = False, seed: int = 0, resamples: int = 10_000) -> Comparison:
    """Compare two runs.

    Args:
        first: folder A, a run's `--output_path`.
        second: folder B.
        common: compare what both hold, where they do not hold the same.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        UserError: a folder is no run's, or the runs hold nothing in common, or not the same and `common` is False.
    """
    folders = (first, second)
    runs = [_answers_of(folder) for folder in folders]
    if not common:
        _refuse_unequal(folders, runs)
    keys = defaultdict(lambda: defaultdict(list))  # by task and document, the keys that both hold
    for task, document, repeat in (key for key in runs[0] if key in runs[1]):
        keys[task][document].append((task, document, repeat))
    if not keys:
        raise UserError(f"{first} and {second} have no answer to the same task, document and repeat")
    tasks = []
    for task, documents in keys.items():
        pairs = [[[run[key] for key in found] for run in runs] for found in documents.values()]
        answers = sum(map(len, documents.values()))
        left_out = tuple(sum(key[0] == task for key in run) - answers for run in runs)
        tasks.append(_compare_task(task, pairs, left_out, seed, resamples))
    cards = [
        {(card["task"], card["metric"], card["filter"]): card for card in read_cards(folder)} for folder in folders
    ]
    differences = [*_other_prompts(keys, runs), *_other_facts(cards, set(keys))]
    return Comparison(runs=(str(first), str(second)), tasks=tasks, differences=differences)


def _answers_of(folder: Path) -> dict[Key, Record]:
    """The scored answers of a run by task, document and repeat."""
    answers: dict[Key, Record] = {}
    for record in read_records(folder):
        key = (record.task, json.dumps(record.task_id), record.repeat)
        if key in answers:
            raise UserError(f"{folder} holds repeat {record.repeat} of {record.task_id} in {record.task} twice")
        if record.score is not None and not isfinite(record.score):
            raise UserError(
                f"{folder}: the score of {record.task_id} in {record.task}, repeat {record.repeat}, is {record.score}, "
                "which compares with nothing"
            )
        if record.score is not None:
            answers[key] = record
    return answers


def _refuse_unequal(folders: Sequence[Path], runs: Sequence[Mapping[Key, Record]]) -> None:
    """Raise UserError where the runs do not hold scored answers to the same documents and repeats."""
    alone: dict[str, list[list[str]]] = {}
    for side, (run, other) in enumerate((runs, runs[::-1])):
        for task, document, repeat in run:
            if (task, document, repeat) not in other:
                alone.setdefault(task, [[], []])[side].append(f"{json.loads(document)} repeat {repeat}")
    if alone:
        told = [
            f"{task}: {len(found)} only in {folder} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
            for task, sides in alone.items()
            for folder, found in zip(folders, sides, strict=True)
            if found
        ]
        raise UserError(
            f"the runs do not hold scored answers to the same documents: {'; '.join(told)}. "
            "--common compares those that both hold"
        )


def _compare_task(
    task: str, pairs: list[list[list[Record]]], left_out: tuple[int, ...], seed: int, resamples: int
) -> TaskComparison:
    """Compare a task whose documents have, in each run, the given answers."""
    means = [tuple(fsum(record.score for record in side) / len(side) for side in pair) for pair in pairs]
    differences = [b - a for a, b in means]
    scores = tuple(fsum(side) / len(pairs) for side in zip(*means, strict=True))
    is_binary = all(len(a) == 1 for a, _ in pairs) and all(score in (0, 1) for pair in means for score in pair)
    discordant = (means.count((1, 0)), means.count((0, 1))) if is_binary else None
    changes = [
        Change(task_id=a[0].task_id, scores=mean, statuses=(_statuses(a), _statuses(b)))
        for (a, b), mean in zip(pairs, means, strict=True)
        if mean[0] != mean[1]
    ]
    return TaskComparison(
        task=task,
        documents=len(pairs),
        answers=sum(len(a) for a, _ in pairs),
        left_out=left_out,
        scores=scores,
        difference=fsum(differences) / len(pairs),
        interval95=bootstrap_interval(differences, seed=seed, resamples=resamples),
        discordant=discordant,
        mcnemar_p=mcnemar_p(*discordant) if discordant else None,
        worse=[change for change in changes if change.scores[1] < change.scores[0]],
        better=[change for change in changes if change.scores[1] > change.scores[0]],
        costs=tuple(_cost([record for side in sides for record in side]) for sides in zip(*pairs, strict=True)),
    )


def _statuses(records: Sequence[Record]) -> str:
    """What became of the answers to a document."""
    counts = Counter(record.status or "scored" for record in records)
    return ", ".join(f"{count} {name}" if len(records) > 1 else name for name, count in counts.most_common())


def _cost(records: Sequence[Record]) -> Cost:
    """What answers took together."""

    def total(values: list[Any]) -> Any:
        return None if None in values else sum(values)

    tokens, forwards = (total([getattr(record, name) for record in records]) for name in ("new_tokens", "forwards"))
    seconds = total([(record.cost or {}).get("generation_s") for record in records])
    return Cost(
        new_tokens=tokens,
        forwards=forwards,
        tokens_per_forward=tokens_per_forward(tokens, forwards),
        seconds=None if seconds is None else round(seconds, 3),
    )


def _other_prompts(keys: Mapping[str, Mapping[str, list]], runs: Sequence[Mapping]) -> Iterator[Difference]:
    """The tasks whose prompts are not the same text in both runs."""
    for task, documents in keys.items():
        others = [found for found in documents.values() if runs[0][found[0]].prompt != runs[1][found[0]].prompt]
        if others:
            yield Difference(fact=f"prompts ({len(others)} of {len(documents)})", values=("", ""), tasks=[task])


def _other_facts(cards: Sequence[Mapping[tuple[str, ...], dict[str, Any]]], tasks: set[str]) -> list[Difference]:
    """What differs in the cards of these tasks, beside scores and model; equal differences together."""
    found: dict[str, Difference] = {}
    for key in cards[0]:
        if key not in cards[1] or key[0] not in tasks:
            continue
        sides = [dict(_flat(side[key])) for side in cards]
        facts = sides[0].keys() | sides[1].keys()
        held = {fact.rpartition(".")[2] for fact in facts if not fact.startswith("settings.")}
        for fact in sorted(facts):
            values = tuple(side.get(fact) for side in sides)
            place, _, name = fact.rpartition(".")
            is_said = place.startswith("settings") and name in held  # by what held, beside what was typed
            if values[0] == values[1] or fact.split(".")[0] in RESULTS or fact in OF_THE_MODEL or is_said:
                continue
            known = found.setdefault(json.dumps([fact, values]), Difference(fact=fact, values=values, tasks=[]))
            if key[0] not in known.tasks:
                known.tasks.append(key[0])
    return sorted(found.values(), key=lambda difference: difference.fact)


def read_cards(folder: Path) -> list[dict[str, Any]]:
    """The score cards in a run's folder.

    Raises:
        UserError: there are none.
    """
    path = folder / "scores.json"
    try:
        cards = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no scores.json in {str(folder)!r}: give the --output_path of a run") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} does not hold score cards: {error!r}") from error
    wrong = f"{path} does not hold score cards"
    if not isinstance(cards, list):
        raise UserError(f"{wrong}: it must be a list, got {json.dumps(cards)[:80]}")
    for number, card in enumerate(cards, 1):
        if not isinstance(card, dict):
            raise UserError(f"{wrong}: card {number} must be an object, got {json.dumps(card)[:80]}")
        for name, (fits, what) in _CARD.items():
            if not fits(card.get(name)):
                raise UserError(f"{wrong}: card {number}: {name} must be {what}, got {card.get(name)!r:.80}")
    return cards


def _is_interval(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(is_finite, value)))


def _is_settings(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("gen_kwargs") or {}, dict)


def _is_cost(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(is_finite, value.values())))


_CARD = dict.fromkeys(("task", "metric", "filter"), (lambda value: isinstance(value, str), "a text"))
_CARD |= {"score": (is_number, "a number"), "n": (lambda value: type(value) in (int, type(None)), "a whole number")}
_CARD |= dict.fromkeys(("wilson95", "bootstrap95"), (_is_interval, "two numbers or null"))
_CARD |= {"settings": (_is_settings, "an object"), "cost": (_is_cost, "an object of numbers or null")}
"""What the fields of a score card that are computed with hold."""


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested objects by their dotted names."""
    if isinstance(value, dict) and (value or not name):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _gain(difference: float, bounded: bool) -> str:
    """A difference of scores, in percentage points for shares."""
    return f"{100 * difference:+.1f}" if bounded else f"{difference:+.4f}"


def tables(comparison: Comparison) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of everything a comparison says."""
    scores, costs, changes = [], [], []
    for one in comparison.tasks:
        bounded = all(0 <= score <= 1 for score in one.scores)
        low, high = (_gain(bound, bounded) for bound in one.interval95)
        unit = " points" if bounded else ""
        scores.append(
            [one.task, f"{one.documents}", *(shown(score, bounded) for score in one.scores)]
            + [f"{_gain(one.difference, bounded)}{unit}", f"{low} to {high}"]
            + [f"{len(one.worse)} / {len(one.better)}", "" if one.mcnemar_p is None else f"{one.mcnemar_p:.3g}"]
            + [" / ".join(map(str, one.left_out))]
        )
        for name, cost in zip("AB", one.costs, strict=True):
            costs.append([one.task, name, *("" if value is None else f"{value:,}" for value in asdict(cost).values())])
        for direction, found in (("worse", one.worse), ("better", one.better)):
            for change in found:
                values = [shown(score, bounded) for score in change.scores]
                changes.append([one.task, direction, str(change.task_id), *values, *change.statuses])
    header = [
        "task",
        "documents",
        "A",
        "B",
        "B - A",
        "95 % interval",
        "worse / better",
        "McNemar p",
        "left out of A / B",
    ]
    yield "Scores", header, scores
    if comparison.differences:
        rows = [[one.fact, *map(_fact, one.values), ", ".join(one.tasks)] for one in comparison.differences]
        yield "The runs differ beside the model", ["fact", "A", "B", "tasks"], rows
    yield "Cost", ["task", "run", "new tokens", "forward passes", "tokens per forward", "seconds"], costs
    if changes:
        yield "Changed documents", ["task", "B is", "document", "A", "B", "status in A", "status in B"], changes


def _fact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def as_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown."""
    parts = [f"A: {comparison.runs[0]}\n\nB: {comparison.runs[1]}\n"]
    parts += [f"## {title}\n\n{markdown_table(header, rows)}" for title, header, rows in tables(comparison)]
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, print, and write what `--output` asks for."""
    parser = argparse.ArgumentParser(prog="python -m coda_eval compare", description="Compare two evaluation runs.")
    parser.add_argument("first", metavar="A", type=Path, help="folder of a run, its --output_path")
    parser.add_argument("second", metavar="B", type=Path)
    parser.add_argument("--common", action="store_true", help="compare the answers that both hold; leave out others")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap (default: 10000)")
    parser.add_argument("--output", type=Path, help="file to write: .json or .md")
    args = parser.parse_args(argv)
    if args.output is not None and args.output.suffix not in (".json", ".md"):
        parser.error(f"--output must end in .json or .md, got {str(args.output)!r}")
    for name, least in (("seed", 0), ("resamples", 1)):
        if (value := getattr(args, name)) < least:
            parser.error(f"--{name} must be an integer >= {least}, got {value}")
    comparison = compare(args.first, args.second, common=args.common, seed=args.seed, resamples=args.resamples)
    if args.output is not None:
        text = (
            as_markdown(comparison) if args.output.suffix == ".md" else json.dumps(asdict(comparison), indent=2) + "\n"
        )
        write_output(args.output, text)
    console = Console()
    console.print(escape(f"A: {comparison.runs[0]}\nB: {comparison.runs[1]}"))
    for title, header, rows in tables(comparison):
        table = Table(title=title, title_justify="left")
        for n, name in enumerate(header):
            table.add_column(name, justify="right" if n else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
