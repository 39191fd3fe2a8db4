"""The model behind the server: loading it, and denoising one batch of canvases. The only module that knows tensors."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from CoDALanguageModel import CoDALanguageModel
from CoDALanguageModel.row import Request, Row
from CoDALanguageModel.weight_files import refuse_not_finite

from .scheduler import CanvasRequest
from .settings import DECODING

logger = logging.getLogger(__name__)


def choose_device(device: str) -> str:
    """Resolve ``auto``, and refuse a device that is not there.

    Raises:
        ValueError: the machine has no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise ValueError(f"DEVICE={device}: this machine has {torch.cuda.device_count()} CUDA devices")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("DEVICE=mps: this machine has no such device")
    return device


def choose_dtype(dtype: str, device: str) -> torch.dtype:
    """Resolve ``auto``: float32 on the CPU, bfloat16 elsewhere."""
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return getattr(torch, dtype)


class ModelSampler:
    """A CoDA model as the engine sees it.

    Args:
        model: in evaluation mode, on its device.
    """

    def __init__(self, model: CoDALanguageModel) -> None:
        self._model = model
        decoding = model.generation_config
        config = model.config
        eos = decoding.eos_token_id if decoding.eos_token_id is not None else config.eos_token_id
        self.mask_token_id: int = config.mask_token_id
        self.eos_token_ids = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
        self.context_length: int = config.max_position_embeddings
        self.num_token_ids: int = config.num_token_ids
        self.document_start_id: int | None = (
            config.bos_token_id if config.bos_token_id is not None else config.pad_token_id
        )
        # Left of every prompt and hidden by the attention mask, so any id that is no mask serves.
        self._filler_id: int = config.pad_token_id if config.pad_token_id is not None else 0

    @classmethod
    def load(cls, model_name: str, *, device: str, dtype: str) -> "ModelSampler":
        """Load the model that ``MODEL_NAME`` names.

        Raises:
            ValueError: there is no such model, its weights do not fit or are not finite, or there is no such device.
        """
        device = choose_device(device)
        torch_dtype = choose_dtype(dtype, device)
        try:
            model = CoDALanguageModel.from_pretrained(model_name, dtype=torch_dtype)
            refuse_not_finite(model.named_parameters(), f"in {torch_dtype}")
        except (OSError, ValueError) as error:
            fault = "" if Path(model_name).is_dir() else "no such folder here, and the Hub does not give it: "
            raise ValueError(f"MODEL_NAME={model_name}: {fault}{error}") from error
        logger.info("%s on %s in %s", model_name, device, torch_dtype)
        return cls(model.to(device).eval())

    @property
    def defaults(self) -> dict[str, object]:
        """What the model folder's ``generation_config.json`` decides, by the server's names.

        A saved file holds every setting: what it only repeats of the model room's own defaults decides nothing.
        """
        config = self._model.generation_config
        decided = ((row, getattr(config, row.name)) for row in DECODING)
        return {row.api: value for row, value in decided if value != row.default}

    def check(self, request: CanvasRequest) -> None:
        """Refuse a canvas that could not be denoised.

        Raises:
            ValueError: naming the setting, what is allowed, and what was got.
        """
        prompt = len(request.prompt_ids) + len(request.suffix_ids or ())
        if request.num_positions > self.context_length:
            raise ValueError(
                f"the prompt of {prompt} tokens and max_tokens={request.max_tokens} do not fit in the context of "
                f"{self.context_length} tokens"
            )
        ids = (*request.prompt_ids, *(request.suffix_ids or ()))
        if self.mask_token_id in ids or not all(0 <= i < self.num_token_ids for i in ids):
            raise ValueError(
                f"prompt ids must be in [0, {self.num_token_ids}) and not the mask token {self.mask_token_id}"
            )
        gap = [] if request.suffix_ids is None else [self.mask_token_id] * request.max_tokens
        ids = [*request.prompt_ids, *gap, *(request.suffix_ids or ())]
        config = self._model.generation_config.merged(self._settings([request]))
        Row(Request(ids=ids, settings=config, seed=request.seed), 0, self._model.config, None)

    @torch.inference_mode()
    def run(self, requests: Sequence[CanvasRequest], on_step: Callable[[list[list[int]], int], bool]) -> None:
        """Denoise the canvases of ``requests`` as one left-padded batch.

        Args:
            requests: all with the same ``batch_key``.
            on_step: see ``engine.OnStep``. Its last call sees every mask filled, unless it stopped the batch.
        """
        is_infilling = requests[0].suffix_ids is not None
        inputs, attention_mask, answers = self._canvases(requests, is_infilling)

        def read(canvas: Tensor, num_passes: int) -> bool:
            rows = canvas.tolist()
            return on_step([row[where] for row, where in zip(rows, answers, strict=True)], num_passes)

        self._model.diffusion_generate(
            inputs,
            attention_mask=attention_mask,
            step_callback=read,
            **self._settings(requests),
        )

    def _canvases(self, requests: Sequence[CanvasRequest], is_infilling: bool) -> tuple[Tensor, Tensor, list[slice]]:
        """(B, T) inputs and attention mask, and where each row's answer will stand in the (B, T + new) canvas."""
        rows, answers = [], []
        for request in requests:
            gap = [self.mask_token_id] * request.max_tokens if is_infilling else []
            rows.append([*request.prompt_ids, *gap, *(request.suffix_ids or ())])
        width = max(map(len, rows))
        inputs = torch.full((len(rows), width), self._filler_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(inputs)
        for i, (request, row) in enumerate(zip(requests, rows, strict=True)):
            padding = width - len(row)
            inputs[i, padding:] = torch.tensor(row)
            attention_mask[i, padding:] = 1
            start = padding + len(request.prompt_ids)
            answers.append(slice(start, start + request.max_tokens))
        return inputs, attention_mask, answers

    @staticmethod
    def _settings(requests: Sequence[CanvasRequest]) -> dict[str, object]:
        first = requests[0]
        length = 0 if first.suffix_ids is not None else first.max_tokens
        seeds = [request.seed for request in requests]
        return first.options.overrides() | {"max_new_tokens": length, "seed": seeds}
