"""The model behind the server: loading it, and rows of it that are denoised. The only module that knows tensors."""

import dataclasses
import itertools
import logging
from pathlib import Path

import torch

from CoDALanguageModel import CoDALanguageModel
from CoDALanguageModel.answers import end_ids
from CoDALanguageModel.constraints import Constraint, Lexicon, constraint_of
from CoDALanguageModel.decoder import Decoding
from CoDALanguageModel.decoding_settings import SETTINGS, DecodingSettings
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.infilling import lay_out
from CoDALanguageModel.row import Request, Row, complete
from CoDALanguageModel.weight_files import refuse_not_finite

from .engine import RowStep
from .scheduler import CanvasRequest
from .settings import DECODING

logger = logging.getLogger(__name__)


def choose_device(device: str) -> str:
    """Resolve `auto`, and refuse a device that is not there.

    Raises:
        UserError: the machine has no such device.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        return "cpu" if found is None else found.type
    kind, _, index = device.partition(":")
    count = torch.accelerator.device_count() if found is not None and found.type == kind else 0
    if kind != "cpu" and int(index or 0) >= count:
        raise UserError(f"DEVICE={device}: this machine has {count} {kind} devices")
    return device


def choose_dtype(dtype: str, device: str) -> torch.dtype:
    """Resolve `auto`: float32 on the CPU, bfloat16 elsewhere."""
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
        self.mask_token_id: int = config.mask_token_id
        self.eos_token_ids = end_ids(config, decoding)
        self.stop: tuple[str, ...] = tuple(decoding.stop_strings or ())
        self.context_length: int = config.max_position_embeddings
        self.num_token_ids: int = config.num_token_ids
        self.document_start_id: int | None = config.document_start_id
        self.attention: str = config.attention
        self.block_size: int | None = config.block_size

    @classmethod
    def load(cls, model_name: str, *, device: str, dtype: str) -> "ModelSampler":
        """Load the model that `MODEL_NAME` names.

        Raises:
            UserError: there is no such model, its weights do not fit or are not finite, or there is no such device.
        """
        device = choose_device(device)
        torch_dtype = choose_dtype(dtype, device)
        try:
            model = CoDALanguageModel.from_pretrained(model_name, dtype=torch_dtype)
            refuse_not_finite(model.named_parameters(), f"in {torch_dtype}")
        except (OSError, ValueError) as error:
            fault = "" if Path(model_name).is_dir() else "no such folder here, and the Hub does not give it: "
            raise UserError(f"MODEL_NAME={model_name}: {fault}{error}") from error
        logger.info("%s on %s in %s", model_name, device, torch_dtype)
        return cls(model.to(device).eval())

    @property
    def defaults(self) -> dict[str, object]:
        """What the model folder's `generation_config.json` decides, by the server's names.

        A saved file holds every setting: what it only repeats of the model room's own defaults decides nothing. A
        model with blocks takes its own ones, and by default a step for each token, however long an answer is.
        """
        config = self._model.generation_config
        said = {setting.name: getattr(config, setting.name) for setting in DECODING}
        if config.do_sample is False:
            said["temperature"] = 0.0
        if isinstance(config.seed, int):  # or one for each row of some batch
            said["seed"] = config.seed
        blocks = {"block_length": None, "steps": self.context_length} if self.block_size is not None else {}
        return blocks | {SETTINGS[name].api: value for name, value in said.items() if value != SETTINGS[name].default}

    def check(self, request: CanvasRequest) -> None:
        """Refuse a canvas that could not be denoised.

        Raises:
            UserError: naming the setting, what is allowed, and what was got.
        """
        prompt = sum(map(len, request.pieces))
        if request.num_positions > self.context_length:
            raise UserError(
                f"the prompt of {prompt} tokens and max_tokens={request.max_tokens} do not fit in the context of "
                f"{self.context_length} tokens"
            )
        ids = tuple(itertools.chain(*request.pieces, request.forced or ()))
        if self.mask_token_id in ids or not all(0 <= i < self.num_token_ids for i in ids):
            raise UserError(
                f"prompt ids must be in [0, {self.num_token_ids}) and not the mask token {self.mask_token_id}"
            )
        try:
            Row(self.canvas(request), 0, self._model.config, None)
        except UserError as error:
            if request.suffix_ids is None:
                raise
            # Something else may be at fault.
            self.check(dataclasses.replace(request, suffix_ids=None, more_gaps=()))
            raise UserError(f"suffix cannot be used: {error}") from error

    def start(self) -> "Rows":
        """Nothing yet, which rows may join."""
        return Rows(self)

    def decoding(self) -> Decoding:
        """The open loop of the model."""
        return Decoding(self._model)

    def canvas(self, request: CanvasRequest) -> Request:
        """The request as the model room takes it."""
        if request.suffix_ids is None:
            ids, length = list(request.prompt_ids), request.max_tokens
        else:
            ids, length = lay_out(request.pieces, request.gap_lengths, self.mask_token_id).ids, 0
        keeps_scores = request.is_candidate or request.logprobs is not None
        own = {"max_new_tokens": length, "output_scores": keeps_scores}
        return Request(
            ids=ids,
            settings=self._model.generation_config.merged(request.options.overrides() | own),
            seed=request.seed,
            keeps_best=bool(request.logprobs),
            keeps_guesses=request.shows_canvas,
            forced=None if request.forced is None else [*request.prompt_ids, *request.forced],
            constraint=request.constraint,
        )

    def constraint(self, options: DecodingSettings, lexicon: Lexicon) -> Constraint | None:
        """What `regex` or `json_schema` of the options demand; it may take seconds.

        Raises:
            UserError: it cannot be used.
        """
        model = self._model
        config = complete(model.generation_config.merged(options.overrides()), model.config)
        return constraint_of(config, model.config.vocab_size, lexicon)


def _score(row: Row) -> float | None:
    """Mean log-probability of the filled tokens when they were committed; None where the row does not keep it."""
    return None if row.log_probability is None else float(row.log_probability[row.gaps].mean())


class Rows:
    """The rows that are being denoised, as the engine sees them; each gets the tokens that it would get alone."""

    def __init__(self, sampler: ModelSampler) -> None:
        self._sampler = sampler
        self._decoding = sampler.decoding()
        self._read: dict[Row, tuple[int, int, bool]] = {}
        """Columns of each answer, the next one to read and the one behind it; and whether to tell its evidence."""

    def admit(self, request: CanvasRequest) -> Row:
        """Take a canvas in from the next step on.

        Raises:
            UserError: it cannot be denoised.
        """
        row = self._decoding.admit(self._sampler.canvas(request))
        start = len(request.prompt_ids)
        # From the first gap to the end of the last one, the text between them included.
        self._read[row] = start, request.num_positions - len(request.pieces[-1]), request.logprobs is not None
        return row

    @property
    def forwards(self) -> int:
        """Forward passes of the model so far."""
        return self._decoding.forwards

    @torch.inference_mode()
    def step(self) -> list[RowStep]:
        """Take one step of every row."""
        steps = []
        for row, settled, _, finished, error in self._decoding.step():
            start, end, tells = self._read[row]
            settled = max(start, min(settled, end))
            if finished is None and error is None:
                self._read[row] = settled, end, tells
            else:
                del self._read[row]
            steps.append(
                RowStep(
                    row=row,
                    ids=row.ids[start:settled],
                    is_full=settled == end or finished is not None,
                    forwards=row.cost.forwards,
                    rows=row.cost.rows_evaluated,
                    cached_tokens=row.cost.tokens_shared,
                    error=error,
                    score=None if finished is None else _score(row),
                    evidence=[row.evidence[column] for column in range(start, settled)] if tells else (),
                    changes=row.shown() if row.request.keeps_guesses else (),
                )
            )
        return steps

    def drop(self, row: Row) -> None:
        """Take a row out; its place is free at once."""
        self._decoding.drop(row)
        self._read.pop(row, None)
