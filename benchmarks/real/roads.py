"""The benchmarks by both roads: transformers' own class, and the same weights as blocks of one token.

The roads take turns after every few problems, so that whenever it is stopped both have answered the same first ones.
Both keep their answers in journals, as `python -m coda_eval run --resume` does.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from lm_eval.config.evaluate_config import EvaluatorConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from coda_eval import run
from coda_eval.__main__ import lm_eval_arguments
from coda_eval.comparison import mcnemar_p
from coda_eval.data import problem
from coda_eval.journal import Journal, digest
from coda_eval.records import Record, read_records
from CoDALanguageModel.intervals import wilson_interval

from .task import BATCH_SIZE, CHUNK, NEW_TOKENS, Task, load, say, timed

ROADS = ("coda", "hf")
GAP_TOKENS = 128
"""Longest text of a gap, which is one line."""

SHOWN = 12
"""Answers that differ and are looked into."""


class Road:
    """One way to answer a task's problems; its model is loaded when it has to."""

    def __init__(self, task: Task, name: str, benchmark: str, folder: Path, new_tokens: int) -> None:
        """Take the problems.

        Args:
            task: whose model.
            name: of `--model`.
            benchmark: a task of the evaluation room.
            folder: of all answers of this model to this benchmark.
            new_tokens: of the longest answer.
        """
        self.name, self.benchmark = name, benchmark
        arguments: dict[str, Any] = {"pretrained": str(task.source), "dtype": "float32"}
        if name == "coda":
            arguments |= {"pretrained": str(task.converted("float32")), "temperature": 0, "steps": new_tokens}
        self.config = configuration(name, benchmark, arguments, new_tokens, folder / name)
        self.tasks = run.check_tasks(self.config)
        manager, (found,), _ = self.tasks
        self.documents = list(manager.load([found])["tasks"][found].eval_docs)
        self._model: Any = None

    def answer(self, places: range) -> None:
        """Answer and judge so many problems, unless it is done."""
        folder = self.folder(places)
        data = digest([[self.documents[at], problem(self.documents[at])] for at in places])
        done = folder / "done.json"
        if done.is_file() and json.loads(done.read_text(encoding="utf-8"))["documents"] == data:
            return
        if self._model is None:
            self._model = run.load_model(self.config)
        one = dataclasses.replace(self.config, samples={self.benchmark: list(places)}, output_path=str(folder))
        run.claim_folder(one.output_path, resume=True)
        spent: dict[str, Any] = {}
        with timed(spent), contextlib.closing(Journal(folder, resume=True)) as journal:
            run.evaluate(one, self.tasks, self._model, journal, resume=True)
        done.write_text(json.dumps({"documents": data, "load": load(), **spent}) + "\n", encoding="utf-8")

    def folder(self, places: range) -> Path:
        """Of these problems."""
        return Path(self.config.output_path, f"{places.start:04d}-{places.stop:04d}")

    def is_done(self, places: range) -> bool:
        """Whether these were answered."""
        return (self.folder(places) / "done.json").is_file()

    def records(self, chunks: Sequence[range]) -> list[Record]:
        """Of problems that were answered."""
        return [record for places in chunks for record in read_records(self.folder(places))]

    def spent(self, chunks: Sequence[range]) -> dict[str, float]:
        """Time, of the command that finished each chunk."""
        files = [json.loads((self.folder(places) / "done.json").read_text(encoding="utf-8")) for places in chunks]
        return {name: round(sum(file[name] for file in files), 1) for name in ("seconds", "cpu_seconds")} | {
            "load": f"{min(file['load'] for file in files)} to {max(file['load'] for file in files)}"
        }


def configuration(
    road: str, benchmark: str, arguments: dict[str, Any], new_tokens: int, folder: Path
) -> EvaluatorConfig:
    """What `python -m coda_eval run` is asked for."""
    command = ["run", "--model", road, "--model_args", json.dumps(arguments), "--tasks", benchmark]
    command += ["--batch_size", str(BATCH_SIZE), "--output_path", str(folder), "--log_samples"]
    command += ["--gen_kwargs", f"max_gen_toks={new_tokens}"]
    args = lm_eval_arguments(command + (["--apply_chat_template"] if benchmark.endswith("_instruct") else []))
    del args.resume
    return run.read_config(args)


def chunks_of(count: int) -> list[range]:
    """The problems' places, `CHUNK` at a time."""
    return [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def programs(task: Task, benchmark: str) -> None:
    """Answer the problems by both roads, in turn, and compare what came out.

    Args:
        task: whose model.
        benchmark: `coda_humaneval` or `coda_mbpp`; with the model's chat template, if it has one, `_instruct`.
    """
    is_chat = AutoTokenizer.from_pretrained(task.source).chat_template is not None
    name = f"{benchmark}_instruct" if is_chat else benchmark
    folder = task.work / "answers" / digest([task.key, name, BATCH_SIZE, NEW_TOKENS])[:12]
    roads = [Road(task, road, name, folder, NEW_TOKENS) for road in ROADS]
    chunks = chunks_of(min(len(roads[0].documents), task.limit or len(roads[0].documents)))
    tell(roads, chunks, len(roads[0].documents))
    for places in chunks:
        for road in roads:
            road.answer(places)
        tell(roads, chunks, len(roads[0].documents))
    first, second = (road.records(chunks) for road in roads)
    explain(task, first, second)


def tell(roads: Sequence[Road], chunks: Sequence[range], all_: int) -> None:
    """What is known of the problems that all roads have answered."""
    done = list(takewhile(lambda places: all(road.is_done(places) for road in roads), chunks))
    if not done:
        return
    found = {road.name: road.records(done) for road in roads}
    for road in roads:
        records = found[road.name]
        passed = sum(record.score == 1 for record in records)
        tokens = [record.new_tokens for record in records]
        facts = {"road": f"--model {road.name}", "task": road.benchmark, "problems": len(records), "of": all_}
        facts |= {"passed": passed, "pass@1": passed / len(records), "wilson95": interval(passed, len(records))}
        facts |= {"new_tokens": sum(tokens), "cut_by_length": sum(number >= NEW_TOKENS for number in tokens)}
        say(_id=road.name, **facts, **road.spent(done))
    pairs = list(zip(*found.values(), strict=True))
    right = [(a.score == 1, b.score == 1) for a, b in pairs]
    only = right.count((True, False)), right.count((False, True))
    say(
        _id="both",
        problems=len(pairs),
        equal_answers=sum(a.answer == b.answer for a, b in pairs),
        equal_verdicts=sum(a.status == b.status for a, b in pairs),
        **{f"only_{name}": count for name, count in zip(found, only, strict=True)},
        mcnemar_p=mcnemar_p(*only),
    )


def interval(passed: int, count: int) -> list[float]:
    """Wilson's, of a share of so many."""
    return [round(bound, 4) for bound in wilson_interval(passed / count, count)]


def explain(task: Task, first: Sequence[Record], second: Sequence[Record]) -> None:
    """Where answers part, and how sure the model was there, of the first few that differ."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a.answer != b.answer]
    if not pairs:
        return
    model = AutoModelForCausalLM.from_pretrained(task.source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(task.source)
    for place, (a, b) in enumerate(pairs[:SHOWN]):
        facts = {"problem": a.task_id, "coda": a.status, "hf": b.status}
        texts = {road: record.answer for road, record in zip(ROADS, (a, b), strict=True)}
        say(_id=f"parting {place}", **facts, **parting(model, tokenizer, a.prompt, texts))


@torch.no_grad()
def parting(model: Any, tokenizer: Any, prompt: str, texts: dict[str, str]) -> dict[str, Any]:
    """The token at which two answers part, and by how many nats the model prefers the one to the other there.

    Args:
        model: transformers' own.
        tokenizer: its.
        prompt: as the chat template writes it.
        texts: the answers, by road.
    """
    first, second = (tokenizer(prompt + text, add_special_tokens=False)["input_ids"] for text in texts.values())
    place = len(os.path.commonprefix([first, second]))
    ends = tokenizer.convert_ids_to_tokens([*first[place : place + 1], *second[place : place + 1]])
    facts: dict[str, Any] = {"parts_behind": tokenizer.decode(first[max(0, place - 8) : place]), "tokens": ends}
    if len(ends) < len(texts):  # one is the beginning of the other
        return facts | {"nats_ahead": None, "best_is_ahead_by": None}
    scores = model(input_ids=torch.tensor([first[:place]]), logits_to_keep=1).logits[0, -1]
    best = scores.topk(2).values
    ahead = scores[first[place]] - scores[second[place]]
    return facts | {"nats_ahead": ahead.item(), "best_is_ahead_by": (best[0] - best[1]).item()}


def infilling(task: Task) -> None:
    """Gaps of whole lines filled by the model's own fill-in-the-middle tokens; the baseline of an adaptation."""
    name = "coda_humaneval_single_line_infilling"
    folder = task.work / "answers" / digest([task.key, name, BATCH_SIZE, GAP_TOKENS])[:12]
    road = Road(task, "hf", name, folder, GAP_TOKENS)
    chunks = chunks_of(min(len(road.documents), task.limit or len(road.documents)))
    done: list[range] = []
    for places in chunks:
        try:
            road.answer(places)
        except SystemExit as error:  # the model, or the problems, are none that this is for
            if done or "fill-in-the-middle" not in str(error):
                raise
            reason = str(error).partition("UserError: ")[2].removesuffix(")")
            say(what=name, skipped=reason.replace(repr(str(task.source)), "the model"))
            return
        done.append(places)
        records = road.records(done)
        passed = sum(record.score == 1 for record in records)
        facts = {"task": name, "problems": len(records), "of": len(road.documents), "passed": passed}
        facts |= {"pass@1": passed / len(records), "wilson95": interval(passed, len(records))}
        say(_id=name, **facts, **road.spent(done))
