"""Tables of the decoding settings for people: `python -m CoDALanguageModel tables FILE...`.

It writes anew what stands in the files between the marks `settings:NAME` and `settings:end`, comments of Markdown or of
an env file.
"""

import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..decoding_settings import DOORS, SETTINGS, Setting, offered


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _table(*rows: tuple[str, ...]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *body))


def _all_settings() -> str:
    def cells(setting: Setting) -> tuple[str, ...]:
        return f"`{setting.name}`", f"`{_shown(setting.default)}`", setting.allowed, setting.regime, setting.says

    return _table(("setting", "default", "allowed", "regime", "meaning"), *map(cells, SETTINGS.values()))


def _server() -> str:
    def cells(setting: Setting) -> tuple[str, ...]:
        default = "unset" if setting.name == "seed" else _shown(setting.served_default)
        return f"`{setting.api.upper()}`", f"`{setting.api}`", f"`{default}`", setting.regime, setting.says

    return _table(("variable", "field", "default", "regime", "effect"), *map(cells, offered("server")))


def _withheld(door: str) -> str:
    reasons: dict[str, list[str]] = {}
    for setting in SETTINGS.values():
        if door in setting.withheld:
            reasons.setdefault(setting.withheld[door], []).append(f"`{setting.name}`")
    return textwrap.fill("; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items()) + ".", 120)


def _environment() -> str:
    lines = []
    for setting in offered("server"):
        allowed = f" ({', '.join(setting.choices)})" if setting.choices else ""
        value = setting.served_default
        if setting.name == "seed":
            lines += ["# Unset: 0 at temperature 0, else a fresh seed per request.", "SEED="]
            continue
        lines += textwrap.wrap(f"{setting.says[0].upper()}{setting.says[1:]}{allowed}.", 120, initial_indent="# ",
                               subsequent_indent="# ")  # fmt: skip
        lines.append(f"{setting.api.upper()}={'' if value is None else value}")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "all": _all_settings,
    "server": _server,
    "environment": _environment,
    **{f"not-{door}": (lambda door=door: _withheld(door)) for door in DOORS},
}
"""What may stand there, by name."""

_MARKED = re.compile(
    r"(?P<head><!-- settings:(?!end)(\S+) -->\n|# settings:(?!end)(\S+)\n).*?"
    r"(?P<tail><!-- settings:end -->|# settings:end\n)",
    re.DOTALL,
)


def with_tables(text: str) -> str:
    """The text with every marked table as the rows give it."""

    def fill(match: re.Match[str]) -> str:
        return f"{match['head']}{TABLES[match[2] or match[3]]()}\n{match['tail']}"

    return _MARKED.sub(fill, text)


def main(files: list[str] | None = None) -> None:
    """Write the tables of some files anew."""
    for path in map(Path, sys.argv[1:] if files is None else files):
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
