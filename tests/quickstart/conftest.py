"""A small tokenizer made by the quickstart's own maker, shared by its tests."""

import pytest

from coda_quickstart.problems import training_programs
from coda_quickstart.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Tokenizer of 600 entries, trained on generated functions."""
    texts = [program.prompt + program.body for program in training_programs(200, seed=0)]
    return train_tokenizer(texts, 600, tmp_path_factory.mktemp("tokenizer"), max_length=256)
