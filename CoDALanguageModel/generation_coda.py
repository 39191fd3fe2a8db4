"""Decoding: `diffusion_generate`, which fills the masks of a batch of canvases in one of three regimes.

Exact: each step scores the canvas as it is. Cached: keys and values outside of a window are reused. Parallel: more
tokens are committed per step than the schedule asks for. All are the same loop: `canvas` says what a step is to do,
`scoring` runs the model, `sampling` chooses. Not here: text (callers tokenise).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.utils import ModelOutput

from .canvas import Canvas
from .decoder import Decoder, SpeculativeDecoder
from .generation_config_coda import DEFAULTS, DiffusionGenerationConfig
from .infilling import InfillOutput, infill
from .scoring import DecodingCost, Scorer

StepCallback = Callable[[Tensor, int], bool | None]


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
        cost: a `DecodingCost`.
        cancelled: whether the callback stopped the decoding; masks may be left then.
    """

    sequences: Tensor | None = None
    history: tuple[Tensor, ...] | None = None
    scores: Tensor | None = None
    commit_steps: Tensor | None = None
    num_forwards: Tensor | None = None
    cost: DecodingCost | None = None
    cancelled: bool | None = None


class DiffusionGenerationMixin(GenerationMixin):
    """Gives a masked-diffusion model `diffusion_generate`, and `generate` that does the same.

    It is a `GenerationMixin` so that pipelines, trainers and LLaMA-Factory find a model that can generate.
    """

    def adjust_generation_fn(self, generation_config, from_auto_class, from_pipeline, path, *args, **kwargs) -> None:
        """Load `generation_config.json` as our settings; called by transformers at the end of `from_pretrained`."""
        if generation_config is not None:
            self.generation_config = DiffusionGenerationConfig.of(generation_config)
            return
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
        """`diffusion_generate` under the name and with the arguments that transformers' callers use."""
        if "input_ids" in kwargs:
            if inputs is not None:
                raise ValueError("inputs and input_ids are the same argument: give one of them")
            inputs = kwargs.pop("input_ids")
        return self.diffusion_generate(inputs, generation_config=generation_config, **kwargs)

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
        return infill(self, pieces, gap_lengths=gap_lengths, lengths=infill_lengths, end_of_gap=end_of_gap, **settings)

    @torch.no_grad()
    def diffusion_generate(
        self,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        step_callback: StepCallback | None = None,
        logits_processor: LogitsProcessorList | None = None,
        tokenizer: Any = None,
        **overrides,
    ) -> Tensor | DiffusionGenerationOutput:
        """Append masks to each row and fill them, and the masks that are in the input, by denoising.

        Each row gets the tokens that it would get alone, whatever the other rows and the padding are.

        Args:
            inputs: (B, T) int64 prompts; `mask_token_id` in them marks gaps to fill.
            attention_mask: (B, T) with 1 at real tokens and 0 at padding, on either side; by default all real.
            generation_config: settings instead of the model's own `generation_config`.
            step_callback: called after each pass with the whole (B, T + max_new_tokens) canvas and the number of
                passes so far; False stops the decoding. The canvas is not to be changed.
            logits_processor: transformers' processors, called with the (N, T + max_new_tokens) canvases and the
                (N, V) scores of the positions that are being filled.
            tokenizer: turns ids into text; needed with `stop_strings`.
            **overrides: settings that replace those of the configuration, see `DiffusionGenerationConfig`.

        Returns:
            (B * num_return_sequences, T + max_new_tokens) int64: prompts untouched, every mask filled, and behind the
            end of an answer (first end token of the appended part, or stop string) the pad token; or a
            `DiffusionGenerationOutput`.

        Raises:
            ValueError: bad settings or inputs, or a canvas longer than the model's context.
        """
        config = DiffusionGenerationConfig.of(generation_config or self.generation_config)
        given = {key: value for key, value in overrides.items() if value is not None or key in DEFAULTS}
        config = config.merged(given)
        for name in ("mask_token_id", "pad_token_id", "eos_token_id", "num_token_ids"):
            if getattr(config, name) is None:
                setattr(config, name, getattr(self.config, name))
        config.check_vocabulary(self.config.vocab_size)
        if config.stop_strings and tokenizer is None:
            raise ValueError("stop_strings need the tokenizer: pass tokenizer=...")
        inputs, attention_mask = _check_inputs(inputs, attention_mask, config, self.config, self.device)
        inputs, attention_mask = _repeat(inputs, attention_mask, config)
        processors = LogitsProcessorList(logits_processor or [])
        if config.repetition_penalty is not None:
            processors.insert(0, RepetitionPenaltyLogitsProcessor(penalty=float(config.repetition_penalty)))
        canvas = Canvas(inputs, attention_mask, config, tokenizer.decode if tokenizer is not None else None)
        scorer = Scorer(self, config, canvas, processors)
        decoder = (SpeculativeDecoder if config.speculate else Decoder)(config, canvas, scorer)
        history: list[Tensor] = []
        num_passes, cancelled = 0, False
        while canvas.active and not cancelled:
            decoder.advance()
            num_passes += 1
            if config.output_history:
                history.append(canvas.ids.clone())
            cancelled = step_callback is not None and step_callback(canvas.ids, num_passes) is False
        if not cancelled:
            canvas.fill_tails()
        scorer.cost.tokens_committed = canvas.num_filled()
        if not config.return_dict_in_generate:
            return canvas.ids
        return DiffusionGenerationOutput(
            sequences=canvas.ids,
            history=tuple(history) if config.output_history else None,
            scores=canvas.log_probability if config.output_scores else None,
            commit_steps=canvas.step_of_commit,
            num_forwards=torch.tensor(canvas.num_forwards, device=canvas.ids.device),
            cost=scorer.cost,
            cancelled=cancelled,
        )


def _repeat(inputs: Tensor, attention_mask: Tensor, config: DiffusionGenerationConfig) -> tuple[Tensor, Tensor]:
    """Rows repeated `num_return_sequences` times, with consecutive seeds."""
    n = config.num_return_sequences
    if n > 1:
        seeds = config.seed if isinstance(config.seed, (list, tuple)) else [config.seed] * len(inputs)
        config.seed = [seed + i for seed in seeds for i in range(n)]
        inputs, attention_mask = inputs.repeat_interleave(n, 0), attention_mask.repeat_interleave(n, 0)
    return inputs, attention_mask


def _check_inputs(
    inputs: Tensor | None, attention_mask: Tensor | None, config: DiffusionGenerationConfig, model_config, device
) -> tuple[Tensor, Tensor]:
    """Refuse inputs that cannot be decoded; give both tensors as int64 on the model's device."""
    if inputs is None:
        raise ValueError("inputs must be a (B, T) tensor of token ids, got None")
    if inputs.ndim != 2 or inputs.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"inputs must be a (B, T) tensor of token ids, got {inputs.dtype} {tuple(inputs.shape)}")
    if attention_mask is None:
        attention_mask = torch.ones_like(inputs)
    if attention_mask.shape != inputs.shape:
        raise ValueError(
            f"attention_mask must have the shape of inputs {tuple(inputs.shape)}, got {tuple(attention_mask.shape)}"
        )
    inputs, attention_mask = inputs.to(device).long(), attention_mask.to(device).long()
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("attention_mask must hold only 0 and 1")
    if inputs.numel() and not 0 <= int(inputs.min()) <= int(inputs.max()) < model_config.vocab_size:
        raise ValueError(
            f"token ids must be in [0, {model_config.vocab_size}), got {int(inputs.min())} to {int(inputs.max())}"
        )
    if isinstance(config.seed, (list, tuple)) and len(config.seed) != len(inputs):
        raise ValueError(f"seed must hold one integer per row ({len(inputs)}), got {len(config.seed)}")
    has_gap = bool(((inputs == config.mask_token_id) & (attention_mask == 1)).any())
    if config.max_new_tokens == 0 and not has_gap:
        raise ValueError("nothing to fill: max_new_tokens is 0 and inputs hold no mask token")
    longest = int(attention_mask.sum(dim=1).max()) if len(inputs) else 0
    if longest + config.max_new_tokens > model_config.max_position_embeddings:
        raise ValueError(
            f"the prompt of {longest} tokens and max_new_tokens={config.max_new_tokens} do not fit in the context of "
            f"{model_config.max_position_embeddings} tokens"
        )
    return inputs, attention_mask
