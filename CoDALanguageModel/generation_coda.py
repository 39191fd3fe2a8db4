"""Decoding: `diffusion_generate`, which fills the masks of a batch of canvases in one of three regimes.

Exact: each step scores the canvas as it is. Cached: keys and values outside of a window are reused. Parallel: more
tokens are committed per step than the schedule asks for. All are the same loop (`decoder`). Not here: text (callers
tokenise).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.utils import GENERATION_CONFIG_NAME, ModelOutput

from .configuration_coda import token_ids
from .constraints import Lexicon, constraint_of
from .cost import DecodingCost
from .decoder import Decoding, Progress
from .decoding_settings import SETTINGS
from .errors import UserError
from .generation_config_coda import DiffusionGenerationConfig, what_is_set
from .infilling import InfillOutput, infill
from .row import NOTHING_TO_FILL, Request, Row, complete
from .run_files import read_json
from .streamers import Feed, Streamer, wants_guesses

StepCallback = Callable[[Tensor, int], bool | None]

MEANINGLESS = ("use_cache", "synced_gpus", "disable_compile")
"""Arguments of transformers' `generate` about the speed of decoding token by token."""

NEUTRAL = {
    "diversity_penalty": 0.0,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "length_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_logits": False,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "typical_p": 1.0,
}
"""Settings of transformers that are none of ours, each with the value that asks for nothing."""


@dataclass
class DiffusionGenerationOutput(ModelOutput):
    """What decoding returns with `return_dict_in_generate`.

    Attributes:
        sequences: (B * num_return_sequences, T + max_new_tokens) int64, the canvases after the last step.
        history: the canvas after each forward pass, when `output_history`.
        scores: (B, T + max_new_tokens) float32, log-probability of each filled token when it was committed, when
            `output_scores`; 0 elsewhere.
        commit_steps: (B, T + max_new_tokens) int64, step at which each token was committed, -1 elsewhere.
        num_forwards: (B,) int64, forward passes that each row took part in.
        tokens_per_forward: (B,) float32, of each row, see `cost`; `cost.tokens_per_forward` is that of all together.
        cost: a `DecodingCost`.
        cancelled: whether the callback stopped the decoding; masks may be left then.
    """

    sequences: Tensor | None = None
    history: tuple[Tensor, ...] | None = None
    scores: Tensor | None = None
    commit_steps: Tensor | None = None
    num_forwards: Tensor | None = None
    tokens_per_forward: Tensor | None = None
    cost: DecodingCost | None = None
    cancelled: bool | None = None


class DiffusionGenerationMixin(GenerationMixin):
    """Gives a masked-diffusion model `diffusion_generate`, and `generate` that does the same.

    It is a `GenerationMixin` so that pipelines, trainers and LLaMA-Factory find a model that can generate.
    """

    def adjust_generation_fn(self, generation_config, from_auto_class, from_pipeline, path, *args, **kwargs) -> None:
        """Load `generation_config.json` as our settings; called by transformers at the end of `from_pretrained`.

        Raises:
            UserError: it is broken, or holds what is no setting of ours.
        """
        if generation_config is not None:
            self.generation_config = DiffusionGenerationConfig.of(generation_config)
            return
        if path is None:  # the weights were given: there is no folder
            self.generation_config = DiffusionGenerationConfig()
            return
        file = Path(path, kwargs.get("subfolder") or "", GENERATION_CONFIG_NAME)
        if file.is_file():
            read_json(file)  # a broken one would be taken below for one that is not there
        names = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
        hub_arguments = {name: kwargs[name] for name in names if name in kwargs}
        try:
            self.generation_config = DiffusionGenerationConfig.from_pretrained(path, **hub_arguments)
        except OSError:  # the folder has none: the defaults hold
            self.generation_config = DiffusionGenerationConfig()

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        """A pipeline asks with defaults for autoregressive models; it gets our own settings. Arguments pass through."""
        return copy.deepcopy(self.generation_config), kwargs

    def generate(self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs):
        """`diffusion_generate` under the name and with the arguments that transformers' callers use.

        `max_length` counts the columns of `inputs` too; `top_k=0` is none; `num_beams` is 1; `stop_strings` may be one
        text; `use_cache`, `synced_gpus` and `disable_compile` mean nothing here; other settings of transformers may
        have the value that asks for nothing (`NEUTRAL`). What a plain `GenerationConfig` leaves unset is as the model's
        own settings say.
        """
        if "input_ids" in kwargs:
            if inputs is not None:
                raise UserError("inputs and input_ids are the same argument: give one of them")
            inputs = kwargs.pop("input_ids")
        width = inputs.shape[-1] if isinstance(inputs, Tensor) else 0
        if generation_config is not None and not isinstance(generation_config, DiffusionGenerationConfig):
            own = DiffusionGenerationConfig.of(self.generation_config)
            generation_config = own.merged(_translated(what_is_set(generation_config), width))
        return self.diffusion_generate(inputs, generation_config=generation_config, **_translated(kwargs, width))

    def infill(
        self,
        pieces: Sequence[Sequence[int]],
        *,
        gap_lengths: Sequence[int] | None = None,
        infill_lengths: Sequence[int] | None = None,
        end_of_gap: bool = False,
        **settings,
    ) -> InfillOutput:
        """Fill the gaps between pieces of a text; see `infilling.infill`."""
        return infill(
            self, pieces, gap_lengths=gap_lengths, infill_lengths=infill_lengths, end_of_gap=end_of_gap, **settings
        )

    @torch.no_grad()
    def diffusion_generate(
        self,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        step_callback: StepCallback | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        tokenizer: Any = None,
        streamer: Streamer | None = None,
        **overrides,
    ) -> Tensor | DiffusionGenerationOutput:
        """Append masks to each row and fill them, and the masks that are in the input, by denoising.

        Each row gets the tokens that it would get alone, whatever the other rows and the padding are.

        Args:
            inputs: (B, T) int64 prompts; `mask_token_id` in them marks gaps to fill.
            attention_mask: (B, T) with 1 at real tokens and 0 at padding, on either side; by default all real.
            generation_config: settings instead of the model's own `generation_config`; a plain `GenerationConfig`
                leaves those that it does not set.
            step_callback: called after each pass with the whole (B, T + max_new_tokens) canvas and the number of
                passes so far; False stops the decoding. The canvas is not to be changed.
            logits_processor: transformers' processors, called with the (N, T + max_new_tokens) canvases and the
                (N, V) scores of the positions that are being filled; at padding they see masks.
            stopping_criteria: transformers' criteria, called with the (1, n) final tokens at the left of one row, for
                each n beyond the prompt, and None for scores; the answer ends with the first n that they stop.
            tokenizer: turns ids into text; needed with `stop_strings`, `regex` and `json_schema`.
            streamer: any of transformers', for one row: is told tokens as they become final, up to the end of the
                answer, and with `put_draft` (`TextDiffusionStreamer`) also the rest of the canvas after each pass.
            **overrides: settings that replace those of the configuration, see `DiffusionGenerationConfig`.

        Returns:
            (B * num_return_sequences, T + max_new_tokens) int64: prompts untouched, every mask filled, and behind the
            end of an answer (first end token of the appended part, or stop string) the pad token; or a
            `DiffusionGenerationOutput`.

        Raises:
            UserError: bad settings or inputs, or a canvas longer than the model's context.
        """
        config = DiffusionGenerationConfig.of(self.generation_config)
        if generation_config is not None:
            is_ours = isinstance(generation_config, DiffusionGenerationConfig)
            config = generation_config if is_ours else config.merged(what_is_set(generation_config))
        given = {key: value for key, value in overrides.items() if value is not None or key in SETTINGS}
        config = config.merged(given)
        config = complete(config, self.config)
        if config.stop_strings and tokenizer is None:
            raise UserError("stop_strings need the tokenizer: pass tokenizer=...")
        is_shaped = config.regex is not None or config.json_schema is not None
        if is_shaped and tokenizer is None:
            raise UserError("regex and json_schema need the tokenizer: pass tokenizer=...")
        constraint = constraint_of(config, self.config.vocab_size, Lexicon.of(tokenizer)) if is_shaped else None
        inputs, attention_mask = _check_inputs(inputs, attention_mask, config, self.device)
        criteria = StoppingCriteriaList(stopping_criteria or ())
        if criteria and not config.max_new_tokens:
            raise UserError("stopping_criteria end the appended part, and max_new_tokens is 0")
        if (criteria or config.stop_strings) and config.pad_token_id is None and not token_ids(config.eos_token_id):
            raise UserError(
                "stop_strings and stopping_criteria need pad_token_id or eos_token_id, to stand behind the answer that "
                "they end: both are None"
            )
        seeds = _seeds(config, len(inputs))
        inputs = inputs.repeat_interleave(config.num_return_sequences, 0)
        attention_mask = attention_mask.repeat_interleave(config.num_return_sequences, 0)
        if streamer is not None and len(inputs) != 1:
            number = "more than one row" if len(inputs) else "an empty batch"
            raise UserError(f"streamer must be None for {number}, got {len(inputs)} rows")
        decoding = Decoding(self, decode=tokenizer.decode if tokenizer is not None else None)
        requests = [
            Request(
                ids=ids,
                attention_mask=real,
                settings=config,
                seed=seed,
                processors=logits_processor or (),
                constraint=constraint,
                keeps_guesses=wants_guesses(streamer),
            )
            for ids, real, seed in zip(inputs.tolist(), attention_mask.tolist(), seeds, strict=True)
        ]
        return self._decode_all(decoding, requests, config, inputs, step_callback, criteria, streamer)

    def _decode_all(
        self,
        decoding: Decoding,
        requests: list[Request],
        config: DiffusionGenerationConfig,
        inputs: Tensor,
        step_callback: StepCallback | None,
        criteria: StoppingCriteriaList,
        streamer: Streamer | None,
    ) -> Tensor | DiffusionGenerationOutput:
        """Decode rows of one width to the end and put them together again."""
        # A row without masks is what it will be.
        rows = [decoding.admit(request) if config.max_new_tokens or _has_gap(request) else None for request in requests]
        new = inputs.new_full((len(inputs), config.max_new_tokens), config.mask_token_id)
        canvas = torch.cat([inputs, new], dim=1)
        place = {row: i for i, row in enumerate(rows) if row is not None}
        feed = None if streamer is None else Feed(streamer, requests[0], rows[0])
        history: list[Tensor] = []
        num_passes, cancelled = 0, False
        asked: dict[Row, int] = {}
        while decoding.rows and not cancelled:
            progress = decoding.step()
            for record in progress:
                if record.error is not None:
                    raise record.error
            if criteria:
                _stop(decoding, progress, criteria, asked, inputs)
            num_passes += 1
            if feed is not None:
                feed.step()
            if config.output_history or step_callback is not None:
                canvas = _changed(canvas, progress, place)
            if config.output_history:
                history.append(canvas)
            cancelled = step_callback is not None and step_callback(canvas, num_passes) is False
        for row in decoding.rows:
            decoding.drop(row)
        if feed is not None:
            feed.end()
        canvas = canvas.clone()  # the one before may be in the history
        for row, i in place.items():
            canvas[i] = canvas.new_tensor(row.ids if cancelled else row.text_ids())
        if not config.return_dict_in_generate:
            return canvas
        cost = DecodingCost(forwards=decoding.forwards)
        num_forwards, scores, commit_steps = inputs.new_zeros(len(rows)), None, None
        tokens_per_forward = torch.zeros(len(rows), device=canvas.device)
        if config.output_scores:
            scores, commit_steps = torch.zeros(canvas.shape, device=canvas.device), torch.full_like(canvas, -1)
        for row, i in place.items():
            cost.add(spent := row.spent())
            num_forwards[i], tokens_per_forward[i] = spent.forwards, spent.tokens_per_forward
            if scores is not None:
                scores[i], commit_steps[i] = row.log_probability, canvas.new_tensor(row.commit_steps)
        return DiffusionGenerationOutput(
            sequences=canvas,
            history=tuple(history) if config.output_history else None,
            scores=scores,
            commit_steps=commit_steps,
            num_forwards=num_forwards,
            tokens_per_forward=tokens_per_forward,
            cost=cost,
            cancelled=cancelled,
        )


def _translated(arguments: dict[str, Any], width: int) -> dict[str, Any]:
    """Arguments of transformers' `generate` as ours, for inputs of `width` columns.

    Raises:
        UserError: beams, two lengths, or one that the inputs exceed.
    """
    ours = {key: value for key, value in arguments.items() if key not in MEANINGLESS and not _asks_nothing(key, value)}
    if ours.pop("num_beams", 1) not in (None, 1):
        raise UserError(f"num_beams must be 1: denoising has no beams, got {arguments['num_beams']!r}")
    if ours.get("top_k") == 0:
        ours["top_k"] = None
    if isinstance(ours.get("stop_strings"), str):
        ours["stop_strings"] = [ours["stop_strings"]]
    max_length = ours.pop("max_length", None)
    if max_length is not None:
        if ours.get("max_new_tokens") is not None:
            raise UserError("max_length and max_new_tokens both say how long an answer may be: give one of them")
        if not isinstance(max_length, int) or max_length < width:
            raise UserError(f"max_length must be an integer >= {width}, the tokens of inputs, got {max_length!r}")
        ours["max_new_tokens"] = max_length - width
    return ours


def _asks_nothing(name: str, value: Any) -> bool:
    return name in NEUTRAL and isinstance(value, (bool, int, float)) and value == NEUTRAL[name]


def _stop(
    decoding: Decoding,
    progress: list[Progress],
    criteria: StoppingCriteriaList,
    asked: dict[Row, int],
    inputs: Tensor,
) -> None:
    """End the rows that the criteria stop; `asked` holds the columns of each row of which they were asked."""
    for row, settled, *_ in progress:
        last = min(settled, row.end)
        first = asked.get(row, row.prompt_length) + 1
        asked[row] = last
        # Those that look at the clock are asked anew although no token is.
        for end in range(min(first, last), last + 1):
            if end > row.prompt_length and bool(criteria(inputs.new_tensor([row.ids[:end]]), None)):
                row.end, row.reason = end, "stop"
                decoding.drop(row)
                break


def _has_gap(request: Request) -> bool:
    mask = request.settings.mask_token_id
    return any(token == mask and real for token, real in zip(request.ids, request.attention_mask, strict=True))


def _changed(canvas: Tensor, progress: list[Progress], place: dict[Row, int]) -> Tensor:
    """A new (B, T) canvas with what a step has changed in its rows."""
    columns = [(place[record.row], column, record.row.ids[column]) for record in progress for column in record.changed]
    row, column, token = canvas.new_tensor(columns).view(-1, 3).unbind(1)
    return canvas.index_put((row, column), token)


def _seeds(config: DiffusionGenerationConfig, num_rows: int) -> list[int]:
    """One seed per sequence that comes out: those of a row count up from its own."""
    is_list = isinstance(config.seed, (list, tuple))
    if is_list and len(config.seed) != num_rows:
        raise UserError(f"seed must hold one integer per row ({num_rows}), got {len(config.seed)}")
    seeds = config.seed if is_list else [config.seed] * num_rows
    return [seed + i for seed in seeds for i in range(config.num_return_sequences)]


def _check_inputs(
    inputs: Tensor | None, attention_mask: Tensor | None, config: DiffusionGenerationConfig, device
) -> tuple[Tensor, Tensor]:
    """Refuse inputs that cannot be decoded; give both tensors as int64 on the model's device."""
    if not isinstance(inputs, Tensor):
        found = None if inputs is None else type(inputs).__name__
        raise UserError(f"inputs must be a (B, T) tensor of token ids, got {found}")
    if inputs.ndim != 2 or inputs.dtype not in (torch.int64, torch.int32):
        raise UserError(f"inputs must be a (B, T) tensor of token ids, got {inputs.dtype} {tuple(inputs.shape)}")
    if attention_mask is None:
        attention_mask = torch.ones_like(inputs)
    if attention_mask.shape != inputs.shape:
        raise UserError(
            f"attention_mask must have the shape of inputs {tuple(inputs.shape)}, got {tuple(attention_mask.shape)}"
        )
    inputs, attention_mask = inputs.to(device).long(), attention_mask.to(device).long()
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise UserError("attention_mask must hold only 0 and 1")
    has_gap = bool(((inputs == config.mask_token_id) & (attention_mask == 1)).any())
    if config.max_new_tokens == 0 and not has_gap:
        raise UserError(NOTHING_TO_FILL)
    return inputs, attention_mask
