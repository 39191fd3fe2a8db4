"""`python -m coda_eval leaderboard DIR...`: the score cards of many runs in one table, as Markdown and as a web page.

What others have published (`published.json`, each table with its source) stands in tables of its own: their prompts,
tests and settings are not ours.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from coda_eval.comparison import read_cards
from coda_eval.output import markdown_table, shown, shown_interval, write_output
from CoDALanguageModel.cost import tokens_per_forward
from CoDALanguageModel.errors import UserError

Column = tuple[str, str, str]
"""Task, metric and filter."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A score of a run."""

    score: float
    interval: tuple[float, float] | None
    """95 %: Wilson's for shares, else the bootstrap's, where the card has one."""

    documents: int | None
    bounded: bool
    """Whether the score is a share."""

    @property
    def text(self) -> str:
        """The score as it is shown."""
        return shown(self.score, self.bounded)

    @property
    def details(self) -> str:
        """Interval and number of documents as they are shown."""
        bounds = self.interval and shown_interval(self.interval, self.bounded)
        return ", ".join(filter(None, [bounds, self.documents and f"n = {self.documents}"]))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run."""

    model: str
    folder: str
    settings: str
    isolation: str
    cells: dict[Column, Cell]
    tokens_per_forward: float | None


@cache
def published() -> list[dict[str, Any]]:
    """Tables that others have published, each with its source, columns and rows; scores in percent."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def read_rows(folders: Sequence[Path]) -> list[Row]:
    """The runs in and below folders, each once.

    Raises:
        UserError: one holds no run.
    """
    rows = {}
    for folder in folders:
        found = sorted(path.parent for path in folder.rglob("scores.json")) if os.path.isdir(folder) else []
        if not found:
            raise UserError(f"no scores.json in or below {str(folder)!r}: give folders of runs, their --output_path")
        rows |= {run.resolve(): _row(run) for run in found}
    return list(rows.values())


def _row(folder: Path) -> Row:
    """The run in `folder`."""
    cards = read_cards(folder)
    if not cards:
        raise UserError(f"{folder / 'scores.json'} holds no score")
    columns = [(card["task"], card["metric"], card["filter"]) for card in cards]
    if len(set(columns)) < len(columns) or len({_model_of(card) for card in cards}) > 1:
        raise UserError(
            f"{folder / 'scores.json'} holds the cards of several runs, as report writes them: give that file another "
            "name, and the folders of the runs"
        )
    settings, name = cards[0]["settings"], _model_of(cards[0])
    given = settings.get("model_args")
    given = dict(given) if isinstance(given, dict) else {"model_args": given} if given else {}
    given.pop("pretrained", None)
    given = {**(settings.get("gen_kwargs") or {}), **given}  # in the order of their precedence
    spent: Counter[str] = Counter()
    for cost in {
        card["task"]: card.get("cost") or {} for card in cards
    }.values():  # of a task, not of each of its metrics
        spent.update(cost)
    return Row(
        model=Path(name).name if Path(name).is_absolute() or name.startswith(".") else name,
        folder=str(folder),
        settings=", ".join(f"{key}={value}" for key, value in given.items()),
        isolation=", ".join(dict.fromkeys(str(card["isolation"]) for card in cards if card.get("isolation"))),
        cells=dict(zip(columns, map(_cell, cards), strict=True)),
        tokens_per_forward=tokens_per_forward(spent["new_tokens"], spent["forwards"]),
    )


def _model_of(card: dict[str, Any]) -> str:
    """What names the model of a score: its folder or its name on the Hub, else its kind."""
    settings = card["settings"]
    given = settings.get("model_args")
    return str((given if isinstance(given, dict) else {}).get("pretrained", settings.get("model")))


def _cell(card: dict[str, Any]) -> Cell:
    interval = card.get("wilson95") or card.get("bootstrap95")
    bounded = 0.0 <= card["score"] <= 1.0 and card.get("higher_is_better") is not False
    return Cell(score=card["score"], interval=interval and tuple(interval), documents=card.get("n"), bounded=bounded)


def columns_of(rows: Sequence[Row]) -> dict[Column, str]:
    """Every task, metric and filter with its name, in the order in which they are met.

    The filter is named where a metric has several.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row.cells))
    filters = Counter(column[:2] for column in columns)
    return {c: f"{c[0]} {c[1]}{f' ({c[2]})' if filters[c[:2]] > 1 else ''}" for c in columns}


def as_markdown(rows: Sequence[Row]) -> str:
    """The leaderboard as Markdown."""
    columns = columns_of(rows)
    lines = []
    for row in rows:
        cells = [row.cells.get(column) for column in columns]
        scores = [
            "" if cell is None else f"{cell.text} {cell.details and f'({cell.details})'}".strip() for cell in cells
        ]
        tokens = "" if row.tokens_per_forward is None else f"{row.tokens_per_forward:.2f}"
        lines.append([row.model, *scores, tokens, row.settings, row.isolation, row.folder])
    header = ["model", *columns.values(), "tokens per forward pass", "settings", "isolation", "run"]
    parts = ["# Leaderboard\n", "## Measured\n", markdown_table(header, lines)]
    for table in published():
        body = [[name, *("" if one is None else f"{one:.1f}" for one in row)] for name, row in table["rows"].items()]
        parts += [f"## Published, not measured here: {table['title']}\n", f"{table['source']}. {table['says']}\n"]
        parts.append(markdown_table(["model", *table["columns"]], body))
    return "\n".join(parts)


def as_html(rows: Sequence[Row]) -> str:
    """The leaderboard as a web page that needs no other file."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("leaderboard.html").read_text(encoding="utf-8"))
    return template.render(rows=rows, columns=columns_of(rows), published=published())


def main(argv: Sequence[str] | None = None) -> None:
    """Print the leaderboard as Markdown, and write what `--output` asks for."""
    parser = argparse.ArgumentParser(prog="python -m coda_eval leaderboard", description="One table of many runs.")
    parser.add_argument("folders", metavar="DIR", type=Path, nargs="+", help="folder of a run, or of several")
    parser.add_argument("--output", type=Path, nargs="+", default=[], help="files to write: .md or .html")
    args = parser.parse_args(argv)
    for path in args.output:
        if path.suffix not in (".md", ".html"):
            parser.error(f"--output must end in .md or .html, got {str(path)!r}")
    rows = read_rows(args.folders)
    text = as_markdown(rows)
    for path in args.output:
        write_output(path, text if path.suffix == ".md" else as_html(rows))
    print(text, end="")
