"""A folder with a model and its tokenizer, as the programs load it."""

from typing import Any

from transformers import AutoTokenizer

from ..errors import UserError
from ..modeling_coda import CoDALanguageModel


def load(name: str, *, dtype: str, device: str = "cpu") -> tuple[Any, CoDALanguageModel]:
    """The tokenizer and the model in evaluation mode.

    Raises:
        UserError: there is no such folder or model, or it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # None would ask at the terminal
        return tokenizer, CoDALanguageModel.from_pretrained(name, dtype=dtype).eval().to(device)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: {error}") from error
