"""The command `judge`: judge the answers of a run again, from its journal and without its model.

Tasks, filters and metrics run as they did, on a model that reads its answers from the journal. So judging can be
repeated after it failed, with another sandbox, or after a task's tests were mended; `records.jsonl`, `scores.json` and
lm-eval's results are written as by `run`.
"""

import argparse
import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import setup_logging

from coda_eval import session
from coda_eval.data import DATA_VARIABLE
from coda_eval.journal import COMMAND, Journal, read_likelihood
from coda_eval.programs import Answer
from coda_eval.run import check_limit, check_tasks, read_repeats, run_tasks
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.run_files import read_json


class JournalLM(LM):
    """A model whose answers are those that the last command in a folder made or took."""

    def __init__(self, journal: Journal, command: dict[str, Any]) -> None:
        super().__init__()
        self.command, self.journal = command, journal
        taken = journal.taken.get(command["name"], set())
        self.lines = {line["slot"]: line for key, line in journal.answers.items() if key in taken}

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers to the requests."""
        return list(map(Answer.read, self._lines_of(requests)))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """The likelihoods, whole texts' or not."""
        return list(map(read_likelihood, self._lines_of(requests)))

    loglikelihood_rolling = loglikelihood

    def _lines_of(self, requests: list[Instance]) -> list[dict[str, Any]]:
        repeats: Counter[int] = Counter()
        lines = []
        for request in requests:
            lines.append(self.lines.get(session.slot(request, repeats[id(request)])))
            repeats[id(request)] += request.request_type == "generate_until"
        missing = [request for request, line in zip(requests, lines, strict=True) if line is None]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(requests)} answers are not in the journal, the first to task "
                f"{missing[0].task_name}, document {session.label(missing[0])}: the run did not come to its end, which "
                "--resume finishes, or the problems have changed"
            )
        if unset := [line for line in lines if line["settings"] not in self.journal.settings]:
            raise UserError(
                f"{len(unset)} of {len(requests)} answers in the journal name settings that no line of it holds, the "
                f"first to task {unset[0]['task']}, document {unset[0]['task_id']}: a line was removed"
            )
        state = session.current()
        for request, line in zip(requests, lines, strict=True):
            request.arguments = (line["prompt"], *request.args[1:])  # as the chat template wrote it
            state.settings[request.task_name] = self.journal.settings[line["settings"]]
        return lines

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages; what the template made of them is in the journal."""
        return json.dumps(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template that was used."""
        return self.command["chat_template"]

    @property
    def tokenizer_name(self) -> str:
        """None is needed."""
        return ""

    def get_model_info(self) -> dict[str, Any]:
        """What the results of the run say of its model."""
        return self.command["info"]


_FACTS = {"name": str, "arguments": dict, "tasks": list, "identity": dict, "info": dict, "chat_template": str}
"""What `command.json` holds that is needed here."""

_HELD = {"tasks": list, "include_path": list | None, "samples": dict | int | None, "metadata": dict | None}
_HELD |= {"batch_size": int | str, "limit": float | int | None, "seed": list | None}
"""What arguments are in a run, where lm-eval declares them otherwise."""


def read_command(folder: Path) -> dict[str, Any]:
    """What the last command in a run's folder was asked, and its model.

    Raises:
        UserError: there is none, or the file does not say it.
    """
    path, mend = folder / COMMAND, "the run's own command with --resume writes it anew"
    if not path.is_file():
        raise UserError(f"no {COMMAND} in {str(folder)!r}: give the --output_path of a run")
    command = read_json(path, mend)
    for name, kind in _FACTS.items():
        if not isinstance(command.get(name), kind):
            raise UserError(f"{path}: {name} must be a {kind.__name__}, got {command.get(name)!r:.80}; {mend}")
    kinds, arguments = get_type_hints(EvaluatorConfig) | _HELD, command["arguments"]
    if unknown := sorted(arguments.keys() - kinds):
        raise UserError(f"{path}: arguments has unknown names: {', '.join(unknown)}; {mend}")
    for name, value in arguments.items():
        if not isinstance(value, kinds[name]):
            kind = getattr(kinds[name], "__name__", kinds[name])
            raise UserError(f"{path}: arguments.{name} must be {kind}, got {value!r:.80}; {mend}")
    try:
        check_limit(arguments.get("limit"))
        read_repeats(arguments.get("samples"))
    except UserError as error:
        raise UserError(f"{path}: {error}; {mend}") from error
    texts = {f"tasks[{n}]": name for n, name in enumerate(command["tasks"])} | {"data": command.get("data") or ""}
    texts |= {f"arguments.include_path[{n}]": path for n, path in enumerate(arguments.get("include_path") or ())}
    texts |= {"arguments.output_path": arguments.get("output_path")}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise UserError(f"{path}: {name} must be a text, got {value!r:.80}; {mend}")
    return command


def judge(folder: Path) -> None:
    """Judge the last command of a run again.

    Raises:
        UserError: the folder holds no run, or an answer is missing.
        SystemExit: tasks failed; the message names them.
    """
    command = read_command(folder)
    if command.get("data"):
        os.environ.setdefault(DATA_VARIABLE, command["data"])
    config = EvaluatorConfig(**command["arguments"])
    output = Path(config.output_path)
    config.output_path = str(folder / output.name if output.suffix == ".json" else folder)  # it may have been moved
    config.tasks = command["tasks"]
    config.include_path = [str(Path(__file__).with_name("tasks")), *(config.include_path or [])[1:]]
    manager, names, versions = check_tasks(config)
    with contextlib.closing(Journal(folder, resume=True)) as journal:
        state = session.Session(journal=journal, name=command["name"], model=command["identity"], versions=versions)
        with session.opened(state):
            run_tasks(config, manager, names, JournalLM(journal, command), command)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments and judge."""
    parser = argparse.ArgumentParser(
        prog="python -m coda_eval judge", description="Judge the answers of a run again, without its model."
    )
    parser.add_argument("run", type=Path, help="folder that --output_path named")
    setup_logging()
    judge(parser.parse_args(argv).run)
