"""The report of a run: JSON, Markdown and a log, written anew with each measurement."""

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from CoDALanguageModel.run_files import write_whole

RECORD = "@record "
"""In front of a line that holds a measurement as JSON; every other line of a section is log."""

LONG = ("error", "samples", "curve", "note")
"""Facts that are no cells of a table."""


class Report:
    """`gpu.json`, `gpu.md` and `gpu.log` of a folder."""

    def __init__(self, folder: Path, arguments: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.arguments = folder, arguments
        self.environment: dict[str, Any] = {}
        self.sections: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()  # a section's lines come in a thread
        self._log = (folder / "gpu.log").open("w", encoding="utf-8")
        self._write()

    def start(self, name: str, seconds: float) -> None:
        """A section begins, with so much time."""
        with self._lock:
            self.sections[name] = {"outcome": "unfinished", "limit_s": round(seconds, 1), "measurements": []}
            self._say(f"== {name}: {seconds:.0f} s at most")
            self._write()

    def take(self, name: str, line: str) -> bool:
        """Take a line of a section; whether it was a measurement."""
        with self._lock:
            _, marker, record = line.partition(RECORD)  # behind what was printed without a line break
            try:
                facts = json.loads(record) if marker else None
            except ValueError:  # another process wrote into it
                facts = None
            if facts is None:
                self._note(line)
                return False
            if "environment" in facts:
                self.environment = self.environment or facts["environment"]
            else:
                self.sections[name]["measurements"].append(facts)
                self._say(f"{name}: " + ", ".join(f"{key} {_cell(value)[:200]}" for key, value in facts.items()))
            self._write()
            return True

    def finish(self, name: str, outcome: str, seconds: float, tail: list[str]) -> None:
        """A section has ended; `tail` are its last lines where it failed."""
        with self._lock:
            self.sections[name] |= {"outcome": outcome, "seconds": round(seconds, 1), "tail": tail}
            self._say(f"== {name}: {outcome}, {seconds:.0f} s")
            self._write()

    def _say(self, text: str) -> None:
        print(text, flush=True)
        self._note(text)

    def _note(self, text: str) -> None:
        with self._going_on():
            self._log.write(f"{text}\n")
            self._log.flush()

    def _write(self) -> None:
        whole = {"environment": self.environment, "arguments": self.arguments, "sections": self.sections}
        with self._going_on():
            write_whole(self.folder / "gpu.json", json.dumps(whole, indent=1) + "\n")
            write_whole(self.folder / "gpu.md", "\n".join(self._markdown()) + "\n")

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """Measurements go on where a file cannot be written, as on a full disk: they stand on the standard output."""
        try:
            yield
        except OSError as error:
            print(f"the report in {self.folder} is not whole: {error}", flush=True)

    def _markdown(self) -> list[str]:
        facts = ", ".join(f"{key} {value}" for key, value in self.environment.items() if value is not None)
        lines = ["# On the GPU", "", facts, ""]
        for name, section in self.sections.items():
            lines += [f"## {name}", "", f"{section['outcome']}; limit {section['limit_s']} s", ""]
            lines += tables(section["measurements"])
            if section.get("tail"):
                lines += ["```text", *section["tail"], "```", ""]
        return lines


def said_by(*command: str) -> str | None:
    """What a command says of the machine; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def tables(measurements: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: neighbours of like columns as a table, what is no cell below it, then what was left out."""
    lines: list[str] = []
    made = [row for row in measurements if "skipped" not in row]
    for keys, rows in groupby(made, key=_columns):
        rows = list(rows)
        lines += [f"| {' | '.join(keys)} |", f"|{' --- |' * len(keys)}"] if keys else []
        lines += [f"| {' | '.join(_cell(row[key]) for key in keys)} |" for row in rows] if keys else []
        lines.append("")
        for row in rows:
            lines += [f"- {key}: `{_cell(row[key])}`" for key in LONG if key in row]
        lines.append("")
    left_out = [row for row in measurements if "skipped" in row]
    for _, rows in groupby(left_out, key=lambda row: _NUMBER.sub("_", row["skipped"])):
        rows = list(rows)
        told = "; ".join(_facts(row) for row in (rows if len(rows) < 4 else [rows[0], rows[-1]]))
        lines.append(f"- not measured, {len(rows)}: {rows[0]['skipped']} ({told})")
    return lines + ([""] if left_out else [])


_NUMBER = re.compile(r"\d+")


def _facts(row: dict[str, Any]) -> str:
    """What was to be measured."""
    return ", ".join(f"{key} {_cell(row[key])}" for key in _columns(row) if key not in ("peak_gib", "took_s"))


def _columns(facts: dict[str, Any]) -> tuple[str, ...]:
    return tuple(key for key in facts if key not in (*LONG, "skipped"))


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
