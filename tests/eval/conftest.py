"""A tiny tokenizer, a tiny random CoDA folder, and a model that knows every answer."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils import collect_env
from transformers import PreTrainedTokenizerFast

import coda_eval.harness  # noqa: F401  registers the model
from coda_eval.__main__ import TASKS

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% if not (loop.last and continue_final_message is defined and continue_final_message) %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer with 300 entries and the ChatML template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    texts = ["def add(a, b):\n    return a + b\n", "for x in range(10):\n    print(x)\n"]
    core.train_from_iterator(texts * 20, trainers.BpeTrainer(vocab_size=300, **options))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", mask_token="<|mask|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session", autouse=True)
def _environment_is_read_once() -> Iterator[None]:
    """At the end of each evaluation lm-eval asks pip and others what is installed, in processes that take a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_env, "get_pretty_env_info", functools.cache(collect_env.get_pretty_env_info))
        yield


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> str:
    """Folder of a random two-layer CoDA with its tokenizer."""
    sizes = {"vocab_size": 304, "hidden_size": 48, "intermediate_size": 96, "head_dim": 12}
    folder = tmp_path_factory.mktemp("tiny_coda")
    return str(write_model(folder, build_tokenizer(), bos_token_id=None, initializer_range=0.5, **sizes))


@pytest.fixture(scope="session")
def tasks() -> TaskManager:
    """Index of our task files alone."""
    return TaskManager(include_path=[str(TASKS)], include_defaults=False)


class Oracle(LM):
    """Answers every document with its own solution, passed through `change`."""

    def __init__(self, change=lambda answer: answer) -> None:
        super().__init__()
        self.change = change

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The solutions of the requests' documents."""
        names = ("infill_middle", "canonical_solution", "code")
        return [self.change(next(r.doc[name] for name in names if name in r.doc)) for r in requests]

    def loglikelihood(self, requests: list) -> list:
        """Not used."""
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.fixture(scope="session")
def oracle() -> type[Oracle]:
    """The class of models that know the solutions."""
    return Oracle


@pytest.fixture(scope="session")
def evaluate(tasks: TaskManager) -> Callable[..., tuple[dict, list[dict]]]:
    """Function that gives results and samples of one task."""

    def run(model: Any, task: str, **kwargs: Any) -> tuple[dict, list[dict]]:
        output = simple_evaluate(model, tasks=[task], task_manager=tasks, bootstrap_iters=0, **kwargs)
        return output["results"][task], output["samples"][task]

    return run


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that CODA_EVAL_DATA names."""
    monkeypatch.setenv("CODA_EVAL_DATA", str(tmp_path))
    return tmp_path
