"""Decoding: the settings, and the loop that fills the masks of a batch of canvases.

Not here: what one step computes (`sampling`), and text (callers tokenise).
"""

import copy
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from .diffusion import predecessor_rows
from .sampling import ALGORITHMS, Commit, choose, order_scores, plan_commits, propose, row_uniforms

StepCallback = Callable[[Tensor, int], bool | None]

_DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 128,
    "steps": 128,
    "alg": "entropy",
    "alg_temp": None,
    "temperature": 0.0,
    "top_p": None,
    "top_k": None,
    "block_length": None,
    "eps": 1e-3,
    "seed": 0,
    "eos_early_stop": True,
    "output_history": False,
    "return_dict_in_generate": False,
    "do_sample": None,
    "mask_token_id": None,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "num_token_ids": None,
}
# What transformers itself writes into a generation config.
_METADATA = ("_commit_hash", "_from_model_config", "_original_object_hash", "transformers_version")


class DiffusionGenerationConfig(GenerationConfig):
    """Decoding settings, saved as `generation_config.json`; unknown keys and bad values are errors.

    Args:
        max_new_tokens: masks appended to each row; 0 fills only the masks that are in the input.
        steps: denoising steps per row, at least the number of blocks; steps that would commit nothing cost nothing.
        alg: order of the commits: `origin`, `maskgit_plus`, `topk_margin`, `entropy` or `p2`.
        alg_temp: randomness of that order; None or 0 takes the most confident first.
        temperature: 0 takes the most probable token, otherwise tokens are sampled.
        top_p: mass of the nucleus to sample from, in (0, 1]; None for all.
        top_k: number of tokens to sample from; None for all.
        block_length: decode this many masked tokens at a time from left to right; None all at once.
        eps: last time of the schedule, in (0, 1).
        seed: one int for every row, or a list with one per row. A row's draws depend on its seed alone.
        eos_early_stop: stop a row when an end token is committed and no mask is left of it. The text is the same.
        output_history: also return the canvas after each forward pass.
        return_dict_in_generate: return a `DiffusionGenerationOutput` instead of the sequences.
        do_sample: False means temperature 0; None and True leave the temperature as it is.
        mask_token_id: id of the mask token; by default the model's, as for the ids below.
        pad_token_id: fills a row behind its end token.
        bos_token_id: kept for transformers; not used.
        eos_token_id: id or ids that end an answer.
        num_token_ids: ids from this one on are never sampled.

    Raises:
        ValueError: an unknown key, with the nearest known one; or a value out of its range.
    """

    def __init__(self, **kwargs):
        if kwargs.get("_from_model_config"):
            kwargs = {key: value for key, value in kwargs.items() if key in _METADATA or key.endswith("token_id")}
        # Settings of autoregressive decoding may stand in a file as null: they are unset.
        settings = {key: value for key, value in kwargs.items() if value is not None or key in _DEFAULTS}
        _refuse_unknown(key for key in settings if key not in _METADATA)
        for key, default in _DEFAULTS.items():
            settings.setdefault(key, default)
            setattr(self, key, settings[key])
        super().__init__(**settings)

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Check every value; the arguments are transformers' and change nothing, since every fault is an error.

        Raises:
            ValueError: naming the setting, the allowed values and the value got.
        """

        def number(name: str, low: float, high: float, allowed: str, *, integer: bool = False, none: bool = True):
            value = getattr(self, name)
            if value is None and none:
                return
            right_type = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
            if not right_type or not low <= value <= high:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")

        # A setting of autoregressive decoding that was set as an attribute would otherwise have no effect, silently.
        _refuse_unknown(
            key for key, value in vars(self).items() if value is not None and key not in _METADATA and key[0] != "_"
        )
        infinity = float("inf")
        tiny = 5e-324
        number("max_new_tokens", 0, infinity, "an integer >= 0", integer=True, none=False)
        number("steps", 1, infinity, "an integer >= 1", integer=True, none=False)
        number("block_length", 1, infinity, "an integer >= 1 or None", integer=True)
        number("top_k", 1, infinity, "an integer >= 1 or None", integer=True)
        number("top_p", tiny, 1, "in (0, 1] or None")
        number("temperature", 0, 1e6, "a number >= 0", none=False)
        number("alg_temp", 0, 1e6, "a number >= 0 or None")
        number("eps", tiny, 1 - 1e-9, "in (0, 1)", none=False)
        if self.alg not in ALGORITHMS:
            raise ValueError(f"alg must be one of {', '.join(ALGORITHMS)}, got {self.alg!r}")
        for name in ("eos_early_stop", "output_history", "return_dict_in_generate"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.do_sample not in (None, True, False):
            raise ValueError(f"do_sample must be true, false or None, got {self.do_sample!r}")
        seeds = self.seed if isinstance(self.seed, (list, tuple)) else [self.seed]
        if not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds):
            raise ValueError(f"seed must be an integer >= 0 or a list of them, one per row, got {self.seed!r}")

    def merged(self, overrides: dict[str, Any]) -> "DiffusionGenerationConfig":
        """A checked copy with some settings replaced.

        Raises:
            ValueError: an unknown key or a bad value.
        """
        _refuse_unknown(overrides)
        config = copy.deepcopy(self)
        for key, value in overrides.items():
            setattr(config, key, value)
        config.validate()
        return config


def _refuse_unknown(keys) -> None:
    """Raise for the first key that is no decoding setting, naming the nearest one that is."""
    for key in keys:
        if key not in _DEFAULTS:
            near = difflib.get_close_matches(key, _DEFAULTS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown generation setting {key!r}{hint} (known: {', '.join(sorted(_DEFAULTS))})")


@dataclass
class DiffusionGenerationOutput(ModelOutput):
    """What decoding returns with `return_dict_in_generate`.

    Attributes:
        sequences: (B, T + max_new_tokens) int64, the canvases after the last step.
        history: the canvas after each forward pass, when `output_history`.
        num_forwards: (B,) int64, forward passes that each row took part in.
        cancelled: whether the callback stopped the decoding; masks may be left then.
    """

    sequences: Tensor | None = None
    history: tuple[Tensor, ...] | None = None
    num_forwards: Tensor | None = None
    cancelled: bool | None = None


class DiffusionGenerationMixin(GenerationMixin):
    """Gives a masked-diffusion model `diffusion_generate`, and `generate` that does the same.

    It is a `GenerationMixin` so that pipelines, trainers and LLaMA-Factory find a model that can generate.
    """

    def adjust_generation_fn(self, generation_config, from_auto_class, from_pipeline, path, *args, **kwargs) -> None:
        """Load `generation_config.json` as our settings; called by transformers at the end of `from_pretrained`."""
        if generation_config is not None:
            self.generation_config = _as_diffusion_config(generation_config)
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

    @torch.no_grad()
    def diffusion_generate(
        self,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        step_callback: StepCallback | None = None,
        **overrides,
    ) -> Tensor | DiffusionGenerationOutput:
        """Append masks to each row and fill them, and the masks that are in the input, by denoising.

        Each row gets the tokens that it would get alone, whatever the other rows and the padding are.

        Args:
            inputs: (B, T) int64 prompts; `mask_token_id` in them marks gaps to fill.
            attention_mask: (B, T) with 1 at real tokens and 0 at padding, on either side; by default all real.
            generation_config: settings instead of the model's own `generation_config`.
            step_callback: called after each forward pass with the whole (B, T + max_new_tokens) canvas and the number
                of passes so far; False stops the decoding. The canvas is not to be changed.
            **overrides: settings that replace those of the configuration, see `DiffusionGenerationConfig`.

        Returns:
            (B, T + max_new_tokens) int64: prompts untouched, every mask filled, and behind the first end token of the
            appended part the pad token; or a `DiffusionGenerationOutput`.

        Raises:
            ValueError: bad settings or inputs, or a canvas longer than the model's context.
        """
        config = _as_diffusion_config(generation_config or self.generation_config)
        config = config.merged(
            {key: value for key, value in overrides.items() if value is not None or key in _DEFAULTS}
        )
        for name in ("mask_token_id", "pad_token_id", "eos_token_id", "num_token_ids"):
            if getattr(config, name) is None:
                setattr(config, name, getattr(self.config, name))
        inputs, attention_mask = _check_inputs(inputs, attention_mask, config, self.config, self.device)
        canvas = _Canvas(inputs, attention_mask, config)
        history = []
        cancelled = False
        for num_passes in range(1, canvas.max_forwards + 1):
            if not canvas.active:
                break
            self._denoise(canvas, config)
            if config.output_history:
                history.append(canvas.ids.clone())
            if step_callback is not None and step_callback(canvas.ids, num_passes) is False:
                cancelled = True
                break
        if not cancelled:
            canvas.fill_tails()
        if not config.return_dict_in_generate:
            return canvas.ids
        return DiffusionGenerationOutput(
            sequences=canvas.ids,
            history=tuple(history) if config.output_history else None,
            num_forwards=torch.tensor(canvas.num_forwards, device=canvas.ids.device),
            cancelled=cancelled,
        )

    def _denoise(self, canvas: "_Canvas", config: DiffusionGenerationConfig) -> None:
        """One forward pass of the unfinished rows, and the commits that it allows."""
        rows, commits = canvas.next_commits()
        index = torch.tensor(rows, device=canvas.ids.device)
        all_rows = len(rows) == len(canvas.ids)

        def take(x: Tensor) -> Tensor:
            return x if all_rows else x.index_select(0, index)

        ids, source, position_ids = take(canvas.ids), take(canvas.source), take(canvas.position_ids)
        window = take(canvas.block) == index.new_tensor([commit.block for commit in commits])[:, None]  # (R, T)
        if config.alg != "p2":
            window &= ids == config.mask_token_id
        row, column = window.nonzero(as_tuple=True)  # (N,), (N,)
        scored_rows = source[row, column] if self.config.logits_shift else column
        logits = self(
            input_ids=ids,
            attention_mask=None if canvas.is_unpadded else take(canvas.attention_mask),
            position_ids=position_ids,
            positions=row * ids.shape[1] + scored_rows,
        ).logits  # (N, V)
        logits[:, canvas.banned_ids] = -torch.inf
        logits[:, config.num_token_ids :] = -torch.inf

        def draw(name: str) -> Tensor:
            seeds = [canvas.seeds[r] for r in rows]
            uniforms = row_uniforms(name, seeds, [commit.step for commit in commits], ids.shape[1])
            return uniforms.to(ids.device, torch.float64)[row, position_ids[row, column]]

        temperature = 0.0 if config.do_sample is False else config.temperature
        committed = ids[row, column]
        candidates = propose(
            logits,
            alg=config.alg,
            temperature=temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            uniforms=draw("token") if temperature > 0 else None,
            present=committed.masked_fill(committed == config.mask_token_id, -1) if config.alg == "p2" else None,
        )
        needs_order = config.alg == "origin" or config.alg_temp
        ranking = order_scores(
            candidates.confidence, config.alg, config.alg_temp, draw("order") if needs_order else None
        )
        scores = torch.full(ids.shape, -torch.inf, dtype=ranking.dtype, device=ids.device)
        scores[row, column] = ranking
        chosen = choose(scores, index.new_tensor([commit.count for commit in commits]))
        tokens = ids.clone()
        tokens[row, column] = candidates.tokens
        updated = torch.where(chosen, tokens, ids)
        if config.alg == "p2":
            updated = torch.where(window & ~chosen, config.mask_token_id, updated)
        canvas.advance(rows, index, updated)


class _Canvas:
    """The rows being decoded: their tokens, where their masks were, and how far each row is."""

    def __init__(self, inputs: Tensor, attention_mask: Tensor, config: DiffusionGenerationConfig):
        num_rows, prompt_length = inputs.shape
        new = inputs.new_full((num_rows, config.max_new_tokens), config.mask_token_id)
        self.config = config
        self.ids = torch.cat([inputs, new], dim=1)
        self.attention_mask = torch.cat([attention_mask, torch.ones_like(new)], dim=1)
        self.is_unpadded = bool(attention_mask.all())
        self.position_ids = (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        self.source = predecessor_rows(self.attention_mask)
        self.prompt_length = prompt_length
        fillable = (self.ids == config.mask_token_id) & self.attention_mask.bool()
        ordinal = fillable.long().cumsum(dim=1) - 1
        self.block = torch.where(fillable, ordinal // (config.block_length or self.ids.shape[1]), -1)  # (B, T)
        self.plans = [
            plan_commits(n, steps=config.steps, block_length=config.block_length, eps=config.eps, alg=config.alg)
            for n in fillable.sum(dim=1).tolist()
        ]
        self.max_forwards = max(map(len, self.plans), default=0)
        self.active = [row for row, plan in enumerate(self.plans) if plan]
        self.num_forwards = [0] * num_rows
        self.seeds = list(config.seed) if isinstance(config.seed, (list, tuple)) else [config.seed] * num_rows
        eos = config.eos_token_id
        self.eos_ids = self.ids.new_tensor([] if eos is None else eos if isinstance(eos, (list, tuple)) else [eos])
        self.banned_ids = _banned_ids(config, self.eos_ids)

    def next_commits(self) -> tuple[list[int], list[Commit]]:
        """The unfinished rows and what the next forward pass does to each."""
        return list(self.active), [self.plans[row][self.num_forwards[row]] for row in self.active]

    def advance(self, rows: list[int], index: Tensor, updated: Tensor) -> None:
        """Store the rows after a step and retire those that are finished."""
        self.ids = updated if len(rows) == len(self.ids) else self.ids.index_copy(0, index, updated)
        for row in rows:
            self.num_forwards[row] += 1
        ended = (
            self._has_ended(updated) if self.config.eos_early_stop and self.config.alg != "p2" else [False] * len(rows)
        )
        self.active = [
            row
            for row, end in zip(rows, ended, strict=True)
            if not end and self.num_forwards[row] < len(self.plans[row])
        ]

    def _has_ended(self, ids: Tensor) -> list[bool]:
        """Rows with an end token in the appended part and no mask left of it: nothing before it can change."""
        first_eos = self._first_eos(ids)
        is_mask = ids == self.config.mask_token_id
        first_mask = torch.where(is_mask.any(dim=1), is_mask.int().argmax(dim=1), ids.shape[1])
        return (first_eos < first_mask).tolist()

    def _first_eos(self, ids: Tensor) -> Tensor:
        """(R,) column of the first end token of the appended part, T where there is none."""
        is_eos = torch.isin(ids, self.eos_ids)
        is_eos[:, : self.prompt_length] = False
        return torch.where(is_eos.any(dim=1), is_eos.int().argmax(dim=1), ids.shape[1])

    def fill_tails(self) -> None:
        """Put the pad token behind the first end token of the appended part."""
        behind = torch.arange(self.ids.shape[1], device=self.ids.device) > self._first_eos(self.ids)[:, None]
        fill = self.config.pad_token_id
        if fill is None and len(self.eos_ids):
            fill = int(self.eos_ids[0])
        if fill is not None:
            self.ids = self.ids.masked_fill(behind, fill)


def _banned_ids(config: DiffusionGenerationConfig, eos_ids: Tensor) -> Tensor:
    """Ids that never come out: the mask, and the pad unless it ends answers."""
    banned = {config.mask_token_id}
    if config.pad_token_id is not None and config.pad_token_id not in eos_ids.tolist():
        banned.add(config.pad_token_id)
    return eos_ids.new_tensor(sorted(banned))


def _as_diffusion_config(config: GenerationConfig) -> DiffusionGenerationConfig:
    """Read a plain `GenerationConfig` as ours; settings that it has and we have not are errors."""
    if isinstance(config, DiffusionGenerationConfig):
        return config
    settings = {key: value for key, value in config.to_diff_dict().items() if value is not None}
    return DiffusionGenerationConfig(**settings)


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
