"""Fixtures that tests of several rooms use."""

import gc
import logging
import os
import signal
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

os.environ.setdefault("PET_LOG_DIR", os.devnull)  # torchrun leaves no folder

gc.disable()  # until all is imported: a fifth of that time

LONGEST = (
    "test_resume",
    "test_xla_backend",
    "test_recipes",
    "test_torch_backend",
    "test_training",
    "test_save_hf_model",
)
"""Files that take a minute or nearly one each."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest files, so that no worker is left alone with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish() -> None:
    """Let collections look at what tests make alone, and not each time at the million of what was imported."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_process():
    """A test, or the code that it calls, leaves the process as it was: what it does on a signal, and what it logs."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    silenced, logging.root.manager.disable = logging.root.manager.disable, 0
    after = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before
    assert not silenced


@pytest.fixture
def as_in_a_terminal(same_process):
    """Ctrl-C, SIGTERM and a closed terminal end programs, though the tests run in the background or under nohup."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def repo() -> Path:
    """Root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def coda_shared() -> Path:
    """Folder with data that the repository does not carry (`CODA_SHARED`); the test is skipped without it."""
    folder = Path(os.environ.get("CODA_SHARED") or REPO.parent / "shared")
    if not folder.is_dir():
        pytest.skip("needs the shared data folder: set CODA_SHARED")
    return folder


def train_tokenizer():
    """A byte-level BPE with the control tokens and the chat template of the real one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from CoDALanguageModel.prompts import CHATML_TEMPLATE, CONTROL_TOKENS

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def add(a, b):\n    return a + b\n\n\n  user assistant"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        chat_template=CHATML_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def chatml_tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="session")
def write_model():
    """Give a function that writes a tiny random model to a folder, its tokenizer beside it."""
    import torch

    from CoDALanguageModel import CoDAConfig, CoDALanguageModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
    names = ("mask_token_id", "pad_token_id", "eos_token_id")

    def write(folder, tokenizer, *, seed=0, settings=None, **config):
        ids = {name: getattr(tokenizer, name) for name in names} | {"bos_token_id": tokenizer.pad_token_id}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = CoDALanguageModel(CoDAConfig(**{**sizes, **ids, "num_token_ids": len(tokenizer), **config}))
        if settings is not None:
            model.generation_config = settings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def ask_server():
    """Give a function that has a server of a model's folder answer requests that come at once, in this process."""
    import asyncio

    import httpx

    from coda_serving.__main__ import check_defaults
    from coda_serving.app import Service, build_app
    from coda_serving.engine import Engine
    from coda_serving.metrics import Metrics
    from coda_serving.sampler import ModelSampler
    from coda_serving.scheduler import Scheduler
    from coda_serving.settings import ServerSettings
    from CoDALanguageModel.prompts import Codec

    def ask_all(folder, bodies, path="/v1/completions"):
        sampler, metrics = ModelSampler.load(str(folder), device="cpu", dtype="float32"), Metrics()
        settings = check_defaults(ServerSettings(model_name=str(folder), _env_file=None), sampler)
        scheduler = Scheduler(max_queue=64, max_batch_size=16, max_batch_tokens=32768)
        codec = Codec.load(str(folder))
        engine = Engine(sampler, codec.decode, scheduler, step_timeout_s=60, metrics=metrics)
        app = build_app(Service(settings=settings, engine=engine, encoder=codec, limits=sampler, metrics=metrics))

        async def inner():
            async with app.router.lifespan_context(app):
                transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                    asked = bodies if path is None else [(path, body) for body in bodies]
                    calls = (client.post(url, json=body) if body else client.get(url) for url, body in asked)
                    return await asyncio.gather(*calls)

        return asyncio.run(inner())

    return ask_all
