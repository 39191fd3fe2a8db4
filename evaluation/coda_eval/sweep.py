"""`python -m coda_eval sweep --steps 32,64 --regime exact,dual ...`: an evaluation for each number of steps and regime.

All points run in one process on one loaded model, each in a folder of its own below `--output_path`, which is a run's
folder like any other. A point that is finished is not run again; one that fails is named and stops no other. What
comes out: `sweep.json`, a table, and the plot of score, time and tokens per forward pass against steps.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coda_eval.comparison import read_cards
from coda_eval.data import DATA_VARIABLE
from coda_eval.journal import Journal, hash_weights
from coda_eval.output import markdown_table, shown, shown_interval
from coda_eval.records import Record, read_records
from CoDALanguageModel.cost import tokens_per_forward
from CoDALanguageModel.decoding_settings import SETTINGS, parse_settings
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.intervals import bootstrap_interval
from CoDALanguageModel.run_files import read_json, write_whole

if TYPE_CHECKING:
    from lm_eval.config.evaluate_config import EvaluatorConfig

logger = logging.getLogger(__name__)

REGIMES: dict[str, dict[str, Any]] = {
    "exact": {},
    "prefix": {"kv_cache": "prefix"},
    "dual": {"kv_cache": "dual"},
    "conf": {"remask": "conf"},
}
"""Regimes with a name; any other is written as its settings, `threshold=0.9`, and `+` joins: `dual+threshold=0.9`."""

LINES = {"exact": "-", "cached": "--", "parallel": "-."}
"""How a kind of regime is drawn."""

DONE = "point.json"
"""In a point's folder once it is finished: what it was asked for."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation of a sweep."""

    regime: str
    steps: int
    settings: dict[str, Any]
    """Of the regime, steps included."""

    @property
    def name(self) -> str:
        """Names the point and its folder."""
        return f"steps{self.steps}-{re.sub(r'[^A-Za-z0-9.=+_-]+', '_', self.regime)}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a point gave on one task."""

    metric: str
    score: float
    interval95: tuple[float, float] | None
    documents: int
    seconds_per_answer: float | None
    seconds_interval95: tuple[float, float] | None
    """Bootstrap over documents."""

    tokens_per_forward: float | None
    forwards_per_answer: float | None


def read_regime(text: str) -> dict[str, Any]:
    """The settings of a regime.

    Raises:
        UserError: a part has no name of a regime and no `setting=value`, or sets what another has set.
    """
    settings: dict[str, Any] = {}
    for part in text.split("+"):
        if part not in REGIMES and "=" not in part:
            raise UserError(f"a regime is one of {', '.join(REGIMES)} or setting=value, joined by +, got {part!r}")
        found = REGIMES[part] if part in REGIMES else parse_settings([part], "evaluation")
        for name in found:
            if name in settings or name == "steps":
                raise UserError(f"the regime {text!r} sets {name} {'twice' if name in settings else 'as --steps does'}")
        settings |= found
    return settings


def read_points(steps: str, regimes: str) -> list[Point]:
    """The points of a sweep: every regime at every number of steps.

    Raises:
        UserError: a number or a regime cannot be.
    """
    try:
        counts = [SETTINGS["steps"].checked(int(count)) for count in steps.split(",")]
    except ValueError as error:
        raise UserError(f"--steps must be integers >= 1 with commas between them, got {steps!r}") from error
    found = [
        Point(regime=regime, steps=count, settings={**read_regime(regime), "steps": count})
        for regime in map(str.strip, regimes.split(","))
        for count in counts
    ]
    names = [point.name for point in found]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"points that are asked for twice: {', '.join(twice)}")
    return found


def check_points(points: Sequence[Point], given: Mapping[str, Any]) -> None:
    """Refuse what is wrong with the points before a model is loaded.

    Args:
        points: of the sweep.
        given: `--gen_kwargs` and `--model_args`.

    Raises:
        UserError: a setting that is given belongs to the points, or a value of a point cannot hold.
    """
    for name, value in given.items():
        if name == "steps" or name in SETTINGS and _changes_regime(name, SETTINGS[name].read(value)):
            door = "steps" if name == "steps" else "regime"
            raise UserError(f"{name} is set in --model_args or --gen_kwargs: in a sweep --{door} does")
    for point in points:
        for name, value in point.settings.items():
            SETTINGS[name].checked(value)


def _changes_regime(name: str, value: Any) -> bool:
    return SETTINGS[name].is_approximate(value) or value in SETTINGS[name].takes_back


def run_points(points: Sequence[Point], config: "EvaluatorConfig") -> dict[str, str]:
    """Run the points that are not finished yet, on one model.

    Returns:
        why each point failed that did, by its name.

    Raises:
        UserError: what is asked for cannot be run, or the folder holds another sweep.
    """
    from coda_eval import run  # and lm-eval

    if config.model not in ("coda", "diffllm"):
        raise UserError(f"a sweep is over decoding settings of --model coda, got --model {config.model}")
    check_points(points, {**config.gen_kwargs, **config.model_args})
    asked = _asked(config)
    finished = [point for point in points if _is_finished(config, point, asked)]
    if finished:
        _refuse_other_weights(config, finished)
    left = [point for point in points if point not in finished]
    if not left:
        return {}
    tasks = run.check_tasks(config)
    model = run.load_model(config)
    own = model.model.generation_config
    # What the model's folder asks for must not make every regime one.
    exact = {name: SETTINGS[name].default for name in SETTINGS if _changes_regime(name, getattr(own, name))}
    base, failed = dict(model.fixed_settings), {}
    for point in left:
        try:
            own.merged({**base, **exact, **point.settings})
        except UserError as error:
            raise UserError(f"{point.name}: {error}") from error
    for point in left:
        logger.info("%s: %s", point.name, point.settings)
        settings = exact | point.settings
        model.fixed_settings = base | settings
        folder = Path(config.output_path) / point.name
        one = dataclasses.replace(config, model_args=config.model_args | settings, output_path=str(folder))
        try:
            run.claim_folder(one.output_path, resume=True)
            with contextlib.closing(Journal(folder, run.rank(), resume=True)) as journal:
                run.evaluate(one, tasks, model, journal, resume=True)
        except (UserError, SystemExit) as error:
            failed[point.name] = str(error).removeprefix("coda_eval: error: ")
            logger.error("%s failed: %s", point.name, failed[point.name])
            continue
        if run.speaks():
            write_whole(folder / DONE, json.dumps({**asked, "settings": point.settings}, indent=2) + "\n")
    return failed


def _asked(config: "EvaluatorConfig") -> dict[str, Any]:
    """What the answers of all points depend on, as far as it is typed."""
    names = ("model", "model_args", "tasks", "limit", "samples", "seed", "gen_kwargs", "num_fewshot", "metadata")
    names += ("apply_chat_template", "system_instruction", "fewshot_as_multiturn")
    asked = {name: getattr(config, name) for name in names} | {"data": os.environ.get(DATA_VARIABLE)}
    return json.loads(json.dumps(asked, default=str))


def _is_finished(config: "EvaluatorConfig", point: Point, asked: dict[str, Any]) -> bool:
    """Whether a point has been run to its end."""
    path = Path(config.output_path) / point.name / DONE
    if not path.is_file():
        return False
    done = {"data": asked["data"]} | read_json(path, "remove it, and the point is gone on with")  # old ones lack it
    if other := [name for name, value in {**asked, "settings": point.settings}.items() if done.get(name) != value]:
        raise UserError(f"{path.parent} was run with other {', '.join(other)}: give another --output_path")
    return True


def _refuse_other_weights(config: "EvaluatorConfig", finished: Sequence[Point]) -> None:
    """Refuse a folder whose files have changed since points were run: a sweep is over one model.

    Raises:
        UserError: a point was run on other weights.
    """
    output, model = Path(config.output_path), str(config.model_args.get("pretrained"))
    if not os.path.isdir(model):  # of the Hub, where a revision stays as it is
        return
    try:
        weights = hash_weights(config.model_args, output)
    except OSError as error:
        raise UserError(f"the model could not be read: {error}") from error
    for point in finished:
        if any((card.get("hashes") or {}).get("weights") != weights for card in read_cards(output / point.name)):
            raise UserError(f"{output / point.name} was run with other weights in {model}: give another --output_path")


def measure(folder: Path) -> dict[str, Measured]:
    """What a finished point gave, by task; of several metrics the first."""
    records = defaultdict(list)
    for record in read_records(folder):
        records[record.task].append(record)
    cards: dict[str, dict[str, Any]] = {}
    for card in read_cards(folder):
        if card["task"] in records:  # groups have no answers of their own
            cards.setdefault(card["task"], card)
    return {task: _measured(card, records[task]) for task, card in cards.items()}


def _measured(card: dict[str, Any], records: Sequence[Record]) -> Measured:
    seconds: dict[int, list[float]] = defaultdict(list)
    for record in records:
        if record.cost and record.cost.get("generation_s") is not None:
            seconds[record.doc_id].append(record.cost["generation_s"])
    means = [fsum(of_document) / len(of_document) for of_document in seconds.values()]
    forwards = sum(record.forwards or 0 for record in records)
    interval = card.get("wilson95") or card.get("bootstrap95")
    return Measured(
        metric=card["metric"],
        score=card["score"],
        interval95=interval and tuple(interval),
        documents=len({record.doc_id for record in records}),
        seconds_per_answer=fsum(means) / len(means) if means else None,
        seconds_interval95=bootstrap_interval(means) if means else None,
        tokens_per_forward=tokens_per_forward(sum(record.new_tokens or 0 for record in records), forwards),
        forwards_per_answer=forwards / len(records) if forwards else None,
    )


def as_markdown(
    points: Sequence[Point], results: Mapping[str, Mapping[str, Measured]], failed: Mapping[str, str]
) -> str:
    """The table of a sweep."""
    rows = []
    for point in points:
        for task, one in results.get(point.name, {}).items():
            bounded = 0.0 <= one.score <= 1.0
            seconds = one.seconds_interval95 or ()
            rows.append(
                [task, point.regime, f"{point.steps}", one.metric, shown(one.score, bounded)]
                + ["" if one.interval95 is None else shown_interval(one.interval95, bounded), f"{one.documents}"]
                + ["" if one.seconds_per_answer is None else f"{one.seconds_per_answer:.3g}"]
                + [" to ".join(f"{bound:.3g}" for bound in seconds)]
                + [
                    "" if value is None else f"{value:.2f}"
                    for value in (one.tokens_per_forward, one.forwards_per_answer)
                ]
            )
        if point.name in failed:
            rows.append(["all", point.regime, f"{point.steps}", f"failed: {failed[point.name]}", *[""] * 7])
    header = ["task", "regime", "steps", "metric", "score", "95 % interval", "documents", "seconds per answer"]
    header += ["95 % interval", "tokens per forward pass", "forward passes per answer"]
    return markdown_table(header, rows)


def kind_of(settings: Mapping[str, Any]) -> str:
    """Whether settings may change tokens, and how: exact, cached, parallel, both, or remasking."""
    kinds = {
        SETTINGS[name].regime if SETTINGS[name].is_approximate(value) else "remasking"
        for name, value in settings.items()
        if _changes_regime(name, value)
    }
    return " and ".join(sorted(kinds)) or "exact"


def draw(points: Sequence[Point], results: Mapping[str, Mapping[str, Measured]], paths: Sequence[Path]) -> None:
    """Plot score, seconds per answer and tokens per forward pass against steps, a column for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    tasks = list(dict.fromkeys(task for found in results.values() for task in found))
    regimes = list(dict.fromkeys(point.regime for point in points))
    size = (2.5 + 4.2 * len(tasks), 9.5)
    figure, axes = plt.subplots(3, len(tasks), figsize=size, sharex=True, squeeze=False, layout="constrained")
    for (score, seconds, tokens), task in zip(axes.T, tasks, strict=True):
        drawn = [one for found in results.values() for one in [found.get(task)] if one]
        scale = 100 if all(0.0 <= one.score <= 1.0 for one in drawn) else 1
        for place, regime in enumerate(regimes):
            found = [
                (p, results[p.name][task]) for p in points if p.regime == regime and task in results.get(p.name, {})
            ]
            found.sort(key=lambda pair: pair[0].steps)
            if not found:
                continue
            aside = 1.03 ** (place - (len(regimes) - 1) / 2)  # so that intervals do not cover each other
            kind = kind_of(found[0][0].settings)
            look = {
                "color": f"C{place}",
                "linestyle": LINES.get(kind, ":"),
                "marker": "o",
                "markersize": 4,
                "capsize": 3,
            }
            label = regime if kind in ("exact", regime) else f"{regime} ({kind})"
            for axis, factor, value, interval in (
                (score, scale, lambda one: one.score, lambda one: one.interval95),
                (seconds, 1, lambda one: one.seconds_per_answer, lambda one: one.seconds_interval95),
                (tokens, 1, lambda one: one.tokens_per_forward, lambda one: None),
            ):
                known = [(p.steps * aside, value(one), interval(one)) for p, one in found if value(one) is not None]
                at = [factor * middle for _, middle, _ in known]
                below = [factor * (middle - bounds[0]) if bounds else 0 for _, middle, bounds in known]
                above = [factor * (bounds[1] - middle) if bounds else 0 for _, middle, bounds in known]
                axis.errorbar([x for x, _, _ in known], at, [below, above], label=label, **look)
        score.set_title(task)
        score.set_ylabel(f"{drawn[0].metric}{', %' if scale == 100 else ''}")
        seconds.set(ylabel="seconds per answer", yscale="log")
        tokens.set(ylabel="tokens per forward pass", xlabel="steps", xscale="log")
        tokens.set_xticks(sorted({point.steps for point in points}))
        seconds.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (tokens.xaxis, seconds.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_locator(NullLocator())
        tokens.set_ylim(bottom=0)
        for axis in (score, seconds, tokens):
            axis.grid(alpha=0.3)
    figure.align_ylabels()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False)
    for path in paths:
        figure.savefig(path, dpi=130)
    plt.close(figure)


def report(points: Sequence[Point], output: Path, failed: Mapping[str, str]) -> str:
    """Write `sweep.json`, the table and the plots of all points that are finished; give the table."""
    results = {p.name: measure(output / p.name) for p in points if (output / p.name / DONE).is_file()}
    rows = [
        {
            "name": point.name,
            "regime": point.regime,
            "kind": kind_of(point.settings),
            "settings": point.settings,
            "error": failed.get(point.name),
            "tasks": {task: dataclasses.asdict(one) for task, one in results.get(point.name, {}).items()},
        }
        for point in points
    ]
    table = as_markdown(points, results, failed)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "sweep.json", json.dumps(rows, indent=2) + "\n")
    write_whole(output / "sweep.md", table)
    if results:
        draw(points, results, [output / "sweep.png", output / "sweep.svg"])
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sweep and report it.

    Raises:
        SystemExit: points failed; the message names them, and the others are reported.
    """
    parser = argparse.ArgumentParser(
        prog="python -m coda_eval sweep",
        allow_abbrev=False,
        description="One evaluation for each number of steps and regime, on one loaded model.",
        epilog="All other arguments are those of `python -m coda_eval run`; --output_path is needed.",
    )
    parser.add_argument("--steps", required=True, help="numbers of steps: 32,64,128")
    names = ", ".join(f"{name}{f' ({json.dumps(value)})' if value else ''}" for name, value in REGIMES.items())
    parser.add_argument(
        "--regime", default="exact", help=f"regimes, with commas between them: {names}, or setting=value, joined by +"
    )
    given, rest = parser.parse_known_args(argv)
    points = read_points(given.steps, given.regime)
    from coda_eval.__main__ import lm_eval_arguments

    args = lm_eval_arguments(["run", *rest])
    del args.resume  # a sweep always does
    from coda_eval import run  # and lm-eval

    config = run.read_config(args)
    if not config.output_path or Path(config.output_path).suffix == ".json":
        raise UserError(f"a sweep needs --output_path, a folder, got {config.output_path!r}")
    run.claim_folder(config.output_path, resume=True)
    failed = run_points(points, config)
    if run.speaks():
        print(report(points, Path(config.output_path), failed), end="")
    if failed:
        told = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        raise SystemExit(f"coda_eval: error: {len(failed)} of {len(points)} points failed: {told}")
