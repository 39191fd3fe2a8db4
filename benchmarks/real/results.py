"""What the stages of a model measured: a file for each stage in its working folder, and the report of all models."""

import json
import os
import platform
import textwrap
import threading
from pathlib import Path
from typing import Any

from gpu.report import RECORD, said_by, tables

from CoDALanguageModel.run_files import write_whole

from .stages import STAGES
from .task import load

PREFACE = """
`python benchmarks/real_model.py PATH.gguf|FOLDER`, written by itself. Of the conversion: the largest difference of two
logits as a share of the largest one, places with the same best token, the largest KL divergence in nats, and the mean
of -log p of a token by transformers' own class and by ours. Benchmarks: greedy, float32, with the chat template;
`wilson95` is Wilson's interval of pass@1; answers that part do so behind the text that is shown, where the model gives
coda's token so many nats more than hf's. Seconds are by the clock and of the processor; the load is the number of
processes that wanted to run."""


class Results:
    """The stages of one model, and `real_model.json` and `real_model.md`, which hold those of all models.

    Every stage is a file in the working folder; with each measurement the report is written anew.
    """

    def __init__(self, name: str, work: Path, output: Path, key: str) -> None:
        self.name, self.output, self.key = name, output, key
        self.folder = work / "stages"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()  # a stage's lines come in a thread
        self._log = (work / "log.txt").open("a", encoding="utf-8")

    def stage(self, name: str) -> dict[str, Any]:
        """What is known of a stage of this very model."""
        file = self.folder / f"{name}.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return known if known.get("key") == self.key else {}

    def is_done(self, name: str, stamp: str) -> bool:
        """Whether a stage with this stamp has come to its end, with nothing left out."""
        known = self.stage(name)
        whole = not any("skipped" in row for row in known.get("measurements", ()))
        return known.get("stamp") == stamp and known["outcome"] == "done" and whole

    def start(self, name: str, stamp: str, limit: float) -> None:
        """A stage begins; what it measured before stays if its stamp is the same."""
        with self._lock:
            known = self.stage(name)
            if known.get("stamp") != stamp:
                known = {"key": self.key, "stamp": stamp, "seconds": 0.0, "measurements": []}
            known |= {"outcome": "unfinished", "limit_s": limit, "machine": machine(), "load": [load()], "tail": []}
            known["measurements"] = [row for row in known["measurements"] if "_id" in row]
            self._say(f"== {name}: {limit:.0f} s at most")
            self._write(name, known)

    def take(self, name: str, line: str) -> bool:
        """Take a line of a stage; whether it was a measurement."""
        with self._lock:
            if not line.startswith(RECORD):
                self._log.write(f"{line}\n")
                self._log.flush()
                return False
            facts, known = json.loads(line.removeprefix(RECORD)), self.stage(name)
            rows = known["measurements"]
            place = [at for at, row in enumerate(rows) if "_id" in facts and row.get("_id") == facts["_id"]]
            if place:
                rows[place[0]] = facts
            else:
                rows.append(facts)
            self._say(f"{name}: " + ", ".join(f"{key} {str(value)[:80]}" for key, value in shown(facts).items()))
            self._write(name, known)
            return True

    def finish(self, name: str, outcome: str, seconds: float, tail: list[str]) -> None:
        """A stage has ended; `tail` are its last lines where it failed."""
        with self._lock:
            known = self.stage(name)
            known |= {"outcome": outcome, "tail": tail, "load": [*known["load"], load()]}
            known["seconds"] = round(known["seconds"] + seconds, 1)
            self._say(f"== {name}: {outcome}, {seconds:.0f} s")
            self._write(name, known)

    def _say(self, text: str) -> None:
        print(text, flush=True)
        self._log.write(f"{text}\n")
        self._log.flush()

    def _write(self, name: str, known: dict[str, Any]) -> None:
        write_whole(self.folder / f"{name}.json", json.dumps(known, indent=1) + "\n")
        self.write()

    def write(self) -> None:
        """Write the report; other models in it stay."""
        self.output.mkdir(parents=True, exist_ok=True)
        file = self.output / "real_model.json"
        models = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        models[self.name] = {stage: known for stage in STAGES if (known := self.stage(stage))}
        write_whole(file, json.dumps(models, indent=1) + "\n")
        write_whole(self.output / "real_model.md", "\n".join(markdown(models)) + "\n")


def shown(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts without those that are for the program."""
    return {key: value for key, value in facts.items() if not key.startswith("_")}


def machine() -> str:
    """What a stage runs on."""
    card = said_by("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    commit = said_by("git", "describe", "--always", "--dirty")
    cores = len(os.sched_getaffinity(0))
    return f"{card or 'CPU ' + platform.machine()}, {cores} cores, commit {commit}"


def markdown(models: dict[str, dict[str, Any]]) -> list[str]:
    """The report."""
    lines = ["# Real weights", "", *textwrap.wrap(PREFACE.strip(), 120), ""]
    for model, stages in models.items():
        lines += [f"## {model}", ""]
        for name, known in stages.items():
            ends = " to ".join(map(str, known["load"]))
            lines += [f"### {name}", ""]
            lines += [f"{known['outcome']}; {known['seconds']:.0f} s; {known['machine']}; load {ends}", ""]
            lines += tables([shown(row) for row in known["measurements"]])
            if known["tail"]:
                lines += ["```text", *known["tail"], "```", ""]
    return lines
