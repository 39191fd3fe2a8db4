"""Tiny random models that the tests of the model room share."""

from collections.abc import Callable

import pytest
import torch

from CoDALanguageModel import CoDAConfig, CoDALanguageModel

TINY = {
    "vocab_size": 72,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # 4 x 16 is not the hidden size, as in Qwen3-0.6B and 4B
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # wide enough for logits that depend on the whole canvas
    "bos_token_id": 64,
    "eos_token_id": 65,
    "pad_token_id": 66,
    "mask_token_id": 67,
    "num_token_ids": 68,
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Small matrices are slower on several threads, and sums then depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., CoDAConfig]:
    """Give a function that makes the configuration of a tiny model: 64 ordinary tokens, 4 special, 4 undefined."""

    def make(**changes) -> CoDAConfig:
        return CoDAConfig(**{**TINY, **changes})

    return make


@pytest.fixture(scope="session")
def make_model(tiny_config) -> Callable[..., CoDALanguageModel]:
    """Give a function that makes a tiny model with random weights, in eval mode."""

    def make(seed: int = 0, **changes) -> CoDALanguageModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return CoDALanguageModel(tiny_config(**changes)).eval()

    return make


@pytest.fixture(scope="session")
def model(make_model) -> CoDALanguageModel:
    """A tiny model that no test changes."""
    return make_model()


@pytest.fixture(scope="session")
def double_model(make_model) -> CoDALanguageModel:
    """The same in float64."""
    return make_model().double()


@pytest.fixture(scope="session")
def tokens() -> Callable[..., torch.Tensor]:
    """Give a function that draws ordinary token ids."""

    def make(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))

    return make
