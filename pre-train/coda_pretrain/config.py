"""The run configuration: frozen dataclasses, YAML files merged in order, `key=value` overrides.

A value can be wrong only loudly: an unknown key names the nearest known one, a wrong type or choice names what is
allowed. `data.mixture`, `noise.strategies` and `devices.config` declare the data, masking and hardware sections.
Not here: architecture (`CoDAConfig`, whose fields `model.config` only carries) and anything that touches a device.

No `from __future__ import annotations` in this file: field types must stay types.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.objectives import EVERY_OBJECTIVE, OBJECTIVES, check_objective

from .data.mixture import DataConfig
from .devices.config import HardwareConfig
from .noise.blocks import BlockConfig
from .noise.strategies import MaskingConfig
from .plain_data import from_dict, merge, require_range


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the network comes from: a folder with weights, or fields of `CoDAConfig` and random weights."""

    init_from: str | None = None
    """A folder whose weights start the run: a CoDA one (an export of this package or a Hugging Face folder), or an
    autoregressive Qwen3, Qwen2 (Qwen2.5) or Llama one, which attends in both directions from the first step on."""

    config: dict[str, Any] | None = None
    """Fields of `CoDAConfig` for a model that starts from random weights. Give this or `init_from`."""

    tokenizer: str
    """The tokenizer folder; names the mask and pad ids and is copied into exports."""

    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention", "splash"] = "sdpa"
    """The attention kernel, by its name in transformers. Packed rows without a (seq_len, seq_len) mask in memory:
    `flex_attention` and `flash_attention_2` (cuda; the latter needs the package flash-attn), `splash` (TPU)."""

    attention_annealing_steps: int | None = None
    """Steps in which attention widens from causal to full (`train.annealing`); null is full from the first step on.
    Not with the kernels `flash_attention_2` and `splash`, which know segments alone. Evaluation is always full."""

    attention: Literal["full", "block_causal"] | None = None
    """With `init_from`: who may attend to whom from here on, instead of what the folder says (full for an
    autoregressive one). See `CoDAConfig`, here and below."""

    block_size: int | None = None
    """With `init_from`: tokens per block, instead of what the folder says."""

    block_origin: Literal["text", "answer"] | None = None
    """With `init_from`: where blocks are counted from when answers are written. Rows of documents hold no answer: in
    pre-training blocks are counted from the start of each document."""

    def __post_init__(self) -> None:
        if (self.init_from is None) == (self.config is None):
            raise UserError("give exactly one of model.init_from (a folder) and model.config (fields of CoDAConfig)")
        if self.config is not None and self.changed_facts:
            name, value = next(iter(self.changed_facts.items()))
            raise UserError(f"model.{name} changes what a folder says: give model.config.{name} instead, got {value!r}")
        if self.attention_annealing_steps is not None:
            require_range("model.attention_annealing_steps", self.attention_annealing_steps, at_least=1)

    @property
    def changed_facts(self) -> dict[str, Any]:
        """Fields of `CoDAConfig` that replace those of the folder."""
        given = {name: getattr(self, name) for name in ("attention", "block_size", "block_origin")}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule. Weights and state are float32 whatever the precision of the forward pass."""

    name: Literal["adafactor", "adamw"] = "adafactor"
    learning_rate: float
    """The peak of the schedule."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW only."""

    eps: float | None = None
    """AdamW: added to the denominator (1e-8 when null). Adafactor: added to the squared gradient (1e-30 when null)."""

    weight_decay: float = 0.0
    """Decoupled decay, not applied to biases and norm weights."""

    clip_threshold: float = 1.0
    """Adafactor only: upper bound on the root mean square of one tensor's update."""

    decay_rate: float = -0.8
    """Adafactor only: exponent of the running average's decay, `1 - step ** decay_rate`."""

    z_loss: float = 0.0
    """c adds `c * log(Z) ** 2` to each cross-entropy (1e-4 in PaLM), Z being the sum of the exponentiated logits;
    the reported loss holds it. 0 leaves it out."""

    ema_decay: float | None = None
    """Share that an average of the weights keeps at each update, e.g. 0.999. The average is saved in checkpoints and
    exported with `--weights ema`. Null keeps none."""

    def __post_init__(self) -> None:
        require_range("optimizer.learning_rate", self.learning_rate, above=0.0)
        require_range("optimizer.weight_decay", self.weight_decay, at_least=0.0)
        require_range("optimizer.clip_threshold", self.clip_threshold, above=0.0)
        require_range("optimizer.decay_rate", self.decay_rate, below=0.0)
        require_range("optimizer.z_loss", self.z_loss, at_least=0.0)
        if self.ema_decay is not None:
            require_range("optimizer.ema_decay", self.ema_decay, above=0.0, below=1.0)
        if self.eps is not None:
            require_range("optimizer.eps", self.eps, above=0.0)
        for beta in self.betas:
            require_range("optimizer.betas", beta, at_least=0.0, below=1.0)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves. It is never exactly 0, so the first and last steps do something."""

    name: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 0
    """Steps of linear growth before the peak."""

    min_ratio: float = 0.0
    """The rate that the decay aims at after the last step, as a share of the peak."""

    def __post_init__(self) -> None:
        require_range("schedule.warmup_steps", self.warmup_steps, at_least=0)
        require_range("schedule.min_ratio", self.min_ratio, at_least=0.0, at_most=1.0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, how many to keep, and what to continue from. The last step is always saved."""

    every: int | None = 1000
    """Steps between checkpoints; null saves only the last step."""

    keep: int | None = 3
    """Newest checkpoints kept; null keeps all."""

    resume: str | int = "auto"
    """`auto` continues from the newest checkpoint of the folder if there is one, `latest` insists that there is
    one, `never` refuses a folder that already holds one, a number is the step to continue from, and a path or URL
    the checkpoint."""

    folder: str | None = None
    """Where checkpoints go: a local folder or any fsspec URL (gs://, s3://, ...); null is `output_dir`/checkpoints.
    Several machines need one that all of them see."""

    asynchronous: bool = True
    """Write the files while training goes on. The tensors are copied into the host's memory at the step."""

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) is not None:
                require_range(f"checkpoint.{name}", getattr(self, name), at_least=1)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Validation loss on held-out shards, with noise that is the same at every evaluation."""

    every: int | None = None
    """Steps between evaluations (one more follows the last step); null means none."""

    batches: int = 8
    """Global batches per evaluation, fewer if the held-out data is smaller. Batch i of n holds the rows whose noise
    level lies in the i-th of n equal parts of [`masking.t_min`, 1]; the loss of each part is reported too."""

    data: DataConfig | None = None
    """The held-out shards."""

    def __post_init__(self) -> None:
        require_range("evaluation.batches", self.batches, at_least=1)
        if self.every is not None:
            require_range("evaluation.every", self.every, at_least=1)
            if self.data is None:
                raise UserError("evaluation.every is set, so evaluation.data must name held-out shards; got null")


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases logging."""

    project: str
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is reported. `metrics.jsonl` in `output_dir` is always written."""

    every: int = 10
    """Steps between rows."""

    wandb: WandbConfig | None = None

    tensorboard: bool = False
    """Also write TensorBoard events, into `tensorboard` of `output_dir`."""

    profile_steps: tuple[int, int] | None = None
    """Record a profile of these steps, the first and the last (the run's first step is 1), into `profile` of
    `output_dir`."""

    def __post_init__(self) -> None:
        require_range("metrics.every", self.every, at_least=1)
        if self.profile_steps is not None:
            first, last = self.profile_steps
            if not 1 <= first <= last:
                raise UserError(f"metrics.profile_steps must be [a, b] with 1 <= a <= b, got [{first}, {last}]")


KERNELS = {
    "cpu": ("sdpa", "eager"),
    "cuda": ("sdpa", "eager", "flash_attention_2", "flex_attention"),
    "xla": ("sdpa", "eager", "splash"),
}
"""Attention kernels that each backend can train with."""

SEGMENTS_ALONE = ("flash_attention_2", "splash")
"""Those that evaluate no other rule of who may attend to whom."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a pre-training run; saved in each checkpoint."""

    output_dir: str
    """The run folder: checkpoints/, metrics.jsonl, config.yaml. There is no default."""

    seed: int = 0
    max_steps: int | None = None
    """Optimizer steps of the whole run. Give this or `num_epochs`."""

    num_epochs: float | None = None
    """Passes over the mixture; turned into whole steps, rounded down."""

    global_batch_size: int
    """Rows per optimizer step, over all devices."""

    micro_batch_size: int | None = None
    """Rows, over all devices, that go through the model at once; gradients of the parts are summed. Null: all."""

    seq_len: int
    """Tokens per row."""

    max_grad_norm: float | None = 1.0
    """The global gradient norm is clipped to this; null does not clip."""

    max_skipped_steps: int = 10
    """A step whose loss or gradient is not finite changes nothing; this many in a row end the run."""

    objective: Literal[EVERY_OBJECTIVE] = "masked"  # type: ignore[valid-type]
    """`masked`: noised rows, for a model of full attention. `block`: each row as `[noisy; clean]`, twice as long, for a
    model with attention by blocks; the loss is that of the noisy copy. `joint`: the same with the cross-entropy of the
    next token on the clean copy, which then attends causally."""

    model: ModelConfig
    data: DataConfig
    blocks: BlockConfig = field(default_factory=BlockConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        if (self.max_steps is None) == (self.num_epochs is None):
            raise UserError(
                f"give exactly one of max_steps and num_epochs, got {self.max_steps!r} and {self.num_epochs!r}"
            )
        require_range("seed", self.seed, at_least=0)
        require_range("global_batch_size", self.global_batch_size, at_least=1)
        require_range("seq_len", self.seq_len, at_least=2)
        require_range("max_skipped_steps", self.max_skipped_steps, at_least=1)
        if self.max_steps is not None:
            require_range("max_steps", self.max_steps, at_least=1)
        if self.num_epochs is not None:
            require_range("num_epochs", self.num_epochs, above=0.0)
        if self.max_grad_norm is not None:
            require_range("max_grad_norm", self.max_grad_norm, above=0.0)
        self._check_kernel()
        self._check_objective()
        if self.global_batch_size % self.rows_per_micro_batch:
            raise UserError(
                f"micro_batch_size must divide global_batch_size {self.global_batch_size}, got {self.micro_batch_size}"
            )

    def _check_kernel(self) -> None:
        kernel, backend, hardware = self.model.attn_implementation, self.hardware.backend, self.hardware
        if kernel not in KERNELS[backend]:
            raise UserError(
                f"model.attn_implementation must be one of {', '.join(KERNELS[backend])} on hardware.backend "
                f"{backend!r}, got {kernel!r}"
            )
        if self.model.attention_annealing_steps is not None and kernel in SEGMENTS_ALONE:
            raise UserError(
                "model.attention_annealing_steps needs model.attn_implementation sdpa, eager or flex_attention: "
                f"{kernel!r} knows segments alone and no other rule of who sees whom"
            )
        if kernel == "flex_attention" and not hardware.compile:
            raise UserError(
                "model.attn_implementation 'flex_attention' needs hardware.compile true, got false: uncompiled it "
                "keeps the scores of all pairs of positions in memory"
            )
        if kernel == "flash_attention_2" and hardware.precision != "bf16":
            raise UserError(
                f"model.attn_implementation 'flash_attention_2' needs hardware.precision bf16, got {hardware.precision}"
            )

    def _check_objective(self) -> None:
        if not self.by_blocks and self.blocks != BlockConfig():
            raise UserError(
                f"blocks says nothing with objective 'masked': leave it out or take objective block or joint, "
                f"got {self.blocks}"
            )
        check_objective(
            self.objective,
            complementary=self.blocks.complementary,
            autoregressive_weight=self.blocks.autoregressive_weight,
            t_min=self.masking.t_min,
            names={
                "objective": "objective",
                "complementary": "blocks.complementary",
                "autoregressive_weight": "blocks.autoregressive_weight",
                "t_min": "masking.t_min",
            },
        )
        if not self.by_blocks:
            return
        if self.model.attention_annealing_steps is not None:
            raise UserError(
                "model.attention_annealing_steps widens attention to full, which objective "
                f"{self.objective!r} never has: blocks.growth_steps is what grows there, "
                f"got {self.model.attention_annealing_steps}"
            )
        if self.model.attn_implementation in SEGMENTS_ALONE:
            raise UserError(
                f"objective {self.objective!r} needs model.attn_implementation sdpa, eager or flex_attention: "
                f"{self.model.attn_implementation!r} knows segments alone and no other rule of who sees whom"
            )

    @property
    def by_blocks(self) -> bool:
        """Whether rows are `[noisy; clean]`."""
        return self.objective in OBJECTIVES["block_causal"]

    @property
    def rows_per_sample(self) -> int:
        """Rows that go through the model for one row of the data."""
        return 2 if self.blocks.complementary else 1

    @property
    def rows_per_micro_batch(self) -> int:
        """Rows, over all devices, of one forward pass."""
        return self.global_batch_size if self.micro_batch_size is None else self.micro_batch_size


def load_config(files: list[str], overrides: list[str]) -> RunConfig:
    """Read and merge YAML files in order, apply `dotted.key=value` overrides (values are YAML), and check.

    Raises:
        UserError: a file is missing or no mapping, an override has no `=`, or the result does not fit `RunConfig`.
    """
    return from_dict(RunConfig, read_settings(files, overrides))


def read_settings(files: list[str], overrides: list[str]) -> dict[str, Any]:
    """The merged files and overrides as plain data, not yet checked against `RunConfig`.

    Mappings are merged key by key; any other value replaces the earlier one.

    Raises:
        UserError: a file is missing or no mapping, or an override has no `=`.
    """
    merged: dict[str, Any] = {}
    for name in files:
        if not Path(name).is_file():
            raise UserError(f"--config {name}: no such file")
        try:
            content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"--config {name} is not YAML: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"--config {name} must hold a mapping, got {content!r}")
        merged = merge(merged, content)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"an override must look like key=value, got {override!r}")
        value = _value_of(key, text)
        for part in reversed(key.split(".")):
            value = {part: value}
        merged = merge(merged, value)
    return merged


def _value_of(key: str, text: str) -> Any:
    """What an override's text means: itself where the setting is a text (names hold ` #` or `: `), else YAML."""
    kind: Any = RunConfig
    for part in key.split("."):
        kind = get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    if kind in (str, str | None) and text[:1] not in ("'", '"') and text not in ("", "~", "null"):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the value of {key}={text} is not YAML: {error}") from error
