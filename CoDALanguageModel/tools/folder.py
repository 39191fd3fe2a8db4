"""A folder with a model and its tokenizer, as the programs load it."""

from typing import Any

from ..errors import UserError
from ..modeling_coda import CoDALanguageModel
from ..weight_files import read_tokenizer, refuse_not_finite


def load(name: str, *, dtype: str, device: str = "cpu") -> tuple[Any, CoDALanguageModel]:
    """The tokenizer and the model in evaluation mode.

    Raises:
        UserError: there is no such folder, model or device, it cannot be read, or its weights are not finite.
    """
    try:
        tokenizer, model = read_tokenizer(name), CoDALanguageModel.from_pretrained(name, dtype=dtype)
        refuse_not_finite(model.named_parameters(), f"in {dtype}")
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: {error}") from error
    try:
        return tokenizer, model.eval().to(device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without such devices
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
