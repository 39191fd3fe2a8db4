"""The settings of a run: one YAML file, its `key=value` overrides, and our `diffusion:` section in it.

Everything outside `diffusion:` is LLaMA-Factory's and is checked by LLaMA-Factory. This module only refuses what
would silently change the objective. It imports neither torch nor transformers, so a misspelt key fails at once.
"""

import ast
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from CoDALanguageModel.config_fields import check_fields
from CoDALanguageModel.errors import UserError, did_you_mean
from CoDALanguageModel.objectives import EVERY_OBJECTIVE, OBJECTIVES, check_objective
from CoDALanguageModel.run_files import is_hub_id, read_json

from .checkpoints import file_identity, folder_identity, weights_problem
from .records import MALFORMED, READ_HERE, Layout, data_files, parse_record, read_records, refuse_malformed

BLOCK_SETTINGS = ("objective", "complementary", "autoregressive_weight")
TAILS = ("eos", "pad", "none")
NORMALIZERS = ("maskable", "row", "padded")
OVERLONG = ("cut", "drop")
SAVE_DTYPES = ("source", "float32", "bfloat16")
SWITCHES = ("accept_changes", "other_template")
DEFAULT_DATASET_DIR = Path(__file__).resolve().parents[1] / "LLaMA-Factory" / "data"
MODEL_TYPE = "CoDA"
CUTOFF_LEN = 2048
"""LLaMA-Factory's default for `cutoff_len`, in tokens."""

DEFAULTS: dict[str, Any] = {
    "dataset_dir": str(DEFAULT_DATASET_DIR),
    "include_num_input_tokens_seen": "non_padding",
    "save_total_limit": 2,  # a checkpoint holds weights and optimizer: 12 bytes for each parameter
    "ddp_timeout": 21_600,  # seconds that the other processes wait while the first one tokenises the data
    "disable_tqdm": not sys.stderr.isatty(),  # a bar redrawn into a file floods the log
}
"""What stands in for LLaMA-Factory's own defaults."""

IDENTITY = (
    "cutoff_len", "template", "mask_history", "max_samples", "val_size", "mix_strategy", "default_system",
    "tool_format", "enable_thinking", "seed", "data_seed", "disable_shuffling", "train_sampling_strategy",
    "finetuning_type", "lora_rank", "lora_target", "dataset", "eval_dataset",
)  # fmt: skip
"""LLaMA-Factory settings that decide what is learned, or fit the tensors of a checkpoint."""

PATHS = (
    "model_name_or_path", "adapter_name_or_path", "dataset_dir", "output_dir", "export_dir", "cache_dir", "media_dir",
    "logging_dir", "resume_from_checkpoint", "deepspeed",
)  # fmt: skip
"""Settings whose value on the command line is text, whatever it looks like."""

PLACES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
"""Keys of `dataset_info.json` that say where a data set is."""

ENTRY = ("num_samples", "subset", "split", "folder")
"""Further keys there, beside `formatting`, `ranking`, `columns` and `tags`: the first is a number, the others text."""

LOOKED_AT = 1000
"""Records of each data set that are checked before anything is loaded; all are when the data is read."""

_OWN_LOSS = "the loss is the masked-diffusion cross-entropy; a causal-language-model loss cannot replace it"
_PACKED = "rows packed together would share one noise level, one conditioned span and one tail; set it to false"
_GENERATES = "evaluate generations with coda_eval; the evaluation here is the masked-diffusion loss"
_OTHER_MODEL = "it replaces parts of causal models that CoDA does not have"
_VOCABULARY = "the vocabulary, with the mask token, belongs to the model; convert with save_hf_model.py to change it"
INCOMPATIBLE: dict[str, str] = {
    "use_dft_loss": _OWN_LOSS,
    "use_eaft_loss": _OWN_LOSS,
    "use_asft_loss": _OWN_LOSS,
    "label_smoothing_factor": _OWN_LOSS,
    "packing": _PACKED,
    "neat_packing": _PACKED,
    "predict_with_generate": _GENERATES,
    "do_predict": _GENERATES,
    "compute_accuracy": _GENERATES,
    "streaming": "noise is keyed by the index of the sample, which a stream does not have",
    "train_on_prompt": "the prompt could no longer be told from the answer; use diffusion.prompt_annealing_epochs",
    "use_unsloth": _OTHER_MODEL,
    "enable_liger_kernel": _OTHER_MODEL,
    "use_liger_kernel": _OTHER_MODEL,
    "resize_vocab": _VOCABULARY,
    "add_tokens": _VOCABULARY,
    "add_special_tokens": _VOCABULARY,
    "new_special_tokens_config": _VOCABULARY,
    "split_special_tokens": "control tokens in texts are always read as text, and those of the template never",
    "train_from_scratch": "fine-tuning starts from trained weights; train new ones with coda_pretrain",
    "auto_find_batch_size": "the batch decides the noise and the order of the rows; give a batch that fits",
    "tokenized_path": "rows are cached by what they are made of; a saved copy would be used whatever has changed since",
    "shift_attn": _OTHER_MODEL,
    "mixture_of_depths": _OTHER_MODEL,
    "use_hyper_parallel": _OTHER_MODEL,
    "use_kt": _OTHER_MODEL,
}
"""LLaMA-Factory settings that are refused when switched on, with the reason."""


@dataclass(frozen=True, kw_only=True)
class DiffusionArguments:
    """The `diffusion:` section: how rows are noised and how the loss is normalised."""

    objective: str = "masked"
    """`masked` for a model of full attention; `block` for one of block-causal attention, whose blocks are noised each
    with a level of its own beside the clean text; `joint` adds the autoregressive loss of the clean text."""

    complementary: bool = False
    """Objectives by blocks: every row twice, with masks that complement each other; it doubles the rows of a step."""

    autoregressive_weight: float | None = None
    """Objective `joint` alone, which needs it: weight of the autoregressive loss."""

    t_min: tuple[float, ...] = (0.001,)
    """Smallest noise level drawn, one value or one per epoch (the list is repeated when there are more epochs)."""

    span_probability: tuple[float, ...] = (0.0,)
    """Share of rows masked in runs of `span_lengths` tokens, one value or one per epoch."""

    span_lengths: tuple[int, ...] = (4, 8, 16, 32)
    """Run lengths k, in tokens; each span-masked row draws one of them uniformly."""

    prompt_annealing_epochs: float = 0.0
    """Epochs during which the conditioned (never masked) part of the prompt grows linearly from none to all; 0: off."""

    tail: str = "eos"
    """What is learned behind the answer: `eos` end tokens, `pad` padding up to cutoff_len (published), `none`."""

    tail_tokens: int = 128
    """Longest tail of end tokens; each optimizer step draws a length in [0, tail_tokens] for its rows."""

    normalize: str = "maskable"
    """What the summed loss is divided by: `maskable` tokens, `row` means, `padded` batch size (published)."""

    overlong: str = "cut"
    """Rows longer than cutoff_len: `cut` oldest turns and the answer's end, or `drop` them (published)."""

    eval_seed: int = 0
    """Seed of the fixed noise of the evaluation loss; independent of `seed`, so that runs can be compared."""

    other_template: bool = False
    """Train with `template` although evaluation and serving ask by the checkpoint's own chat template."""

    save_dtype: str = "source"
    """Precision of the trained model's weights: that of the `source`, `float32` or `bfloat16`."""

    accept_changes: bool = False
    """Continue from a checkpoint of other data, another model or other settings of the objective."""

    def __post_init__(self) -> None:
        """Check every value; lists may be given as scalars."""
        for name in ("t_min", "span_probability", "span_lengths"):
            value = getattr(self, name)
            values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
            object.__setattr__(self, name, values)
        _check_numbers("t_min", self.t_min, "numbers in (0, 1)", lambda v: 0.0 < v < 1.0)
        _check_numbers("span_probability", self.span_probability, "numbers in [0, 1]", lambda v: 0.0 <= v <= 1.0)
        _check_numbers("span_lengths", self.span_lengths, "whole numbers >= 1", lambda v: v >= 1, whole=True)
        _check_numbers("prompt_annealing_epochs", (self.prompt_annealing_epochs,), "a number >= 0", lambda v: v >= 0)
        _check_numbers("tail_tokens", (self.tail_tokens,), "a whole number >= 0", lambda v: v >= 0, whole=True)
        _check_numbers("eval_seed", (self.eval_seed,), "a whole number >= 0", lambda v: v >= 0, whole=True)
        for name, allowed in (
            ("objective", EVERY_OBJECTIVE), ("tail", TAILS), ("normalize", NORMALIZERS),
            ("overlong", OVERLONG), ("save_dtype", SAVE_DTYPES),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise UserError(f"diffusion.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("complementary", *SWITCHES):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"diffusion.{name} must be true or false, got {getattr(self, name)!r}")
        weight = self.autoregressive_weight
        check_objective(
            self.objective,
            complementary=self.complementary,
            autoregressive_weight=weight,
            t_min=max(self.t_min),
            names={name: f"diffusion.{name}" for name in (*BLOCK_SETTINGS, "t_min")},
        )
        if weight is not None:
            _check_numbers("autoregressive_weight", (weight,), "a finite number > 0", lambda v: 0 < v < math.inf)


def _check_numbers(name: str, values: Sequence[Any], allowed: str, holds: Any, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if not values or any(isinstance(v, bool) or not isinstance(v, kinds) or not holds(v) for v in values):
        raise UserError(f"diffusion.{name} must be {allowed}, got {list(values)!r}")


def parse_diffusion(section: Mapping[str, Any] | None) -> DiffusionArguments:
    """Build the arguments of the `diffusion:` section.

    Raises:
        UserError: the section is not a mapping, has a key that is not known (the nearest known one is named), or a
            value out of range.
    """
    if section is None:
        return DiffusionArguments()
    if not isinstance(section, Mapping):
        raise UserError(f"diffusion must be a section of key: value lines, got {section!r}")
    known = [field.name for field in dataclasses.fields(DiffusionArguments)]
    for key in section:
        if key not in known:
            hint = did_you_mean(key, known, lambda near: f"'diffusion.{near}'")
            raise UserError(f"unknown key diffusion.{key}{hint} (known: {', '.join(known)})")
    return DiffusionArguments(**section)


def _literal(overrides: Sequence[str]) -> dict[str, str | None]:
    """Overrides that are paths, as they stand: a path may hold commas, brackets, quotes or be a number."""
    pairs = (override.split("=", 1) for override in overrides)
    return {key: None if value == "null" else value for key, value in pairs if key in PATHS}


def load_config(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file and put `key=value` overrides over it (`diffusion.t_min=0.01` reaches into a section).

    Raises:
        UserError: the file is missing, is not a YAML mapping, or an override is not of the form key=value.
    """
    file = Path(path)
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"a configuration must be a .yaml or .yml file, got {path!r}")
    if not file.is_file():
        raise UserError(f"configuration file not found: {file.absolute()}")
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise UserError(f"an override must look like key=value, got {override!r}")
    try:
        loaded = OmegaConf.load(file)
        if not isinstance(loaded, DictConfig):
            raise UserError("it must hold key: value lines")
        parsed = OmegaConf.from_cli([override for override in overrides if override.split("=", 1)[0] not in PATHS])
        config = OmegaConf.to_container(OmegaConf.merge(loaded, parsed), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"cannot read {path} with overrides {list(overrides)}: {error}") from error
    return {**config, **_literal(overrides)}


def check_host_keys(host: Mapping[str, Any]) -> None:
    """Refuse keys that LLaMA-Factory does not have, before its seconds of imports.

    Its fields are read from the source text of the installed packages, so they are those of its version.

    Raises:
        UserError: an unknown key, with the nearest known one, or LLaMA-Factory is not installed.
    """
    known: set[str] = set()
    for package, pattern in (("llamafactory", "hparams/*.py"), ("transformers", "training_args*.py")):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{package} is not installed for {sys.executable}; run: bash setup_env.sh")
        for file in Path(spec.submodule_search_locations[0]).glob(pattern):
            classes = (node for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.ClassDef))
            fields = (node for part in classes for node in part.body if isinstance(node, ast.AnnAssign))
            known |= {field.target.id for field in fields if isinstance(field.target, ast.Name)}
    for key in host:
        if key not in known:
            hint = did_you_mean(key, known) or " (diffusion settings go into the diffusion section)"
            raise UserError(f"unknown key {key!r}: LLaMA-Factory has no such setting{hint}")


def split_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], DiffusionArguments]:
    """Separate LLaMA-Factory's settings from ours, refuse what contradicts the objective, fill in what we rely on.

    Returns:
        The dict for LLaMA-Factory (`stage` is `sft`, its supervised data pipeline) and our arguments.

    Raises:
        UserError: an unknown or bad `diffusion` key, a diffusion key outside its section, a setting listed in
            `INCOMPATIBLE`, another stage, or an environment that switches checks off.
    """
    host = dict(config)
    diffusion = parse_diffusion(host.pop("diffusion", None))
    for field in dataclasses.fields(DiffusionArguments):
        if field.name in host:
            raise UserError(f"{field.name} belongs into the diffusion section: write diffusion.{field.name}")
    for key, reason in INCOMPATIBLE.items():
        if host.get(key):
            raise UserError(f"{key}={host[key]!r} is not supported for masked diffusion: {reason}")
    for key in PATHS:
        if host.get(key) is not None and not isinstance(host[key], str):
            raise UserError(f"{key} must be text, got {host[key]!r}; put it in quotes")
    if host.get("push_to_hub") and host.get("hub_strategy") in ("checkpoint", "all_checkpoints"):
        raise UserError(
            f"hub_strategy={host['hub_strategy']!r} is not supported: a checkpoint gets its name only when it is "
            "whole; use every_save or end"
        )
    if host.get("enable_thinking") is False and host.get("template") is None:
        raise UserError(
            "enable_thinking=False is not supported with the checkpoint's own chat template, which is trained as "
            "evaluation and serving render it; give a template"
        )
    if host.get("ignore_pad_token_for_loss") is False:
        raise UserError("ignore_pad_token_for_loss=False is not supported: to learn padding set diffusion.tail=pad")
    for variable in ("ALLOW_EXTRA_ARGS", "USE_MCA", "USE_RAY", "USE_V1"):
        if os.environ.get(variable, "0").lower() in ("1", "true", "y"):
            raise UserError(f"unset the environment variable {variable}: with it the objective would be lost")
    stage = host.get("stage", "sft")
    if stage not in ("sft", "ddm-sft"):
        raise UserError(f"stage must be sft, got {stage!r}")
    host["stage"] = "sft"
    for key, value in DEFAULTS.items():
        host.setdefault(key, value)
    for key in ("eval_strategy", "save_strategy", "logging_strategy"):
        if host.get(key) is False:  # YAML reads a bare `no` as false
            host[key] = "no"
    return host, diffusion


def check_model_folder(host: Mapping[str, Any], diffusion: DiffusionArguments | None = None) -> None:
    """Fail early when `model_name_or_path` looks like a folder but is not a usable one.

    Args:
        host: LLaMA-Factory's settings.
        diffusion: our settings, where the model is trained: rows of `cutoff_len` tokens must fit into its context and
            the objective to its attention.

    Raises:
        UserError: the setting is missing, or names a local folder that does not exist, has no config.json or is no
            model for these settings.
    """
    name = host.get("model_name_or_path")
    if not name:
        raise UserError("model_name_or_path is required: a CoDA folder in Hugging Face format, or a Hub name")
    folder = Path(name)
    looks_local = folder.exists() or not is_hub_id(name)
    if looks_local and not folder.is_dir():
        raise UserError(f"model_name_or_path: folder not found: {folder.absolute()}")
    if looks_local and not (folder / "config.json").is_file():
        raise UserError(f"model_name_or_path: no config.json in {folder.absolute()}")
    if looks_local:
        try:
            model_config = read_json(folder / "config.json")
        except UserError as error:
            raise UserError(f"model_name_or_path: {error}") from error
        model_type = model_config.get("model_type")
        if model_type != MODEL_TYPE:
            raise UserError(
                f"model_name_or_path={name!r} is a {model_type!r} model, not a {MODEL_TYPE!r} one: "
                "convert it with save_hf_model.py first"
            )
        try:
            check_fields(model_config)
        except UserError as error:
            raise UserError(f"model_name_or_path: {folder / 'config.json'}: {error}") from error
        if diffusion is not None:
            check_length(host.get("cutoff_len", CUTOFF_LEN), model_config.get("max_position_embeddings"))
            check_model_objective(
                diffusion, model_config.get("attention", "full"), model_config.get("logits_shift", True)
            )


def check_weights(host: Mapping[str, Any]) -> None:
    """Refuse a local model folder whose weights are missing or cut off.

    Raises:
        UserError: naming the file.
    """
    folder = Path(host["model_name_or_path"])
    problem = weights_problem(folder) if folder.is_dir() else ""
    if problem:
        from CoDALanguageModel.weight_files import refuse_pointer  # brings torch, which nothing else here needs

        for file in folder.glob("*.safetensors"):
            refuse_pointer(file)
        raise UserError(f"model_name_or_path={str(folder)!r} cannot be used: {problem}")


def check_length(cutoff_len: Any, context: int | None) -> None:
    """Refuse rows that are longer than the model can read.

    Raises:
        UserError: `cutoff_len` is no positive whole number or above the model's context, in tokens.
    """
    if isinstance(cutoff_len, bool) or not isinstance(cutoff_len, int) or cutoff_len < 1:
        raise UserError(f"cutoff_len must be a whole number >= 1, got {cutoff_len!r}")
    if context is not None and cutoff_len > context:
        raise UserError(f"cutoff_len must be at most the model's max_position_embeddings={context}, got {cutoff_len}")


def check_model_objective(diffusion: DiffusionArguments, attention: str, logits_shift: bool) -> None:
    """Refuse an objective that is not one of a model's attention and shift.

    Raises:
        UserError: with the objectives that are.
    """
    allowed = OBJECTIVES[attention] if logits_shift else tuple(o for o in OBJECTIVES[attention] if o != "joint")
    if diffusion.objective not in allowed:
        raise UserError(
            f"diffusion.objective must be {' or '.join(allowed)} for a model with attention {attention!r} and "
            f"logits_shift {str(logits_shift).lower()}, got {diffusion.objective!r}; pre-training adapts a CoDA model "
            "to another attention (model.attention), and save_hf_model.py --attention an autoregressive one"
        )


def check_export(host: Mapping[str, Any]) -> None:
    """Refuse an export that has nothing to merge, or nowhere to go.

    Raises:
        UserError: naming the setting.
    """
    if not host.get("adapter_name_or_path"):
        raise UserError(
            "adapter_name_or_path is required: export merges a LoRA adapter; the folder of a full fine-tuning is "
            "a model already"
        )
    if host.get("finetuning_type", "lora") != "lora":
        raise UserError(f"finetuning_type must be lora to merge an adapter, got {host['finetuning_type']!r}")
    for adapter in str(host["adapter_name_or_path"]).split(","):
        folder = Path(adapter.strip())
        if (folder.is_absolute() or folder.exists()) and not (folder / "adapter_config.json").is_file():
            raise UserError(f"adapter_name_or_path: no adapter_config.json in {folder.absolute()}")
    if not host.get("export_dir"):
        raise UserError("export_dir is required: the folder for the merged model")
    for key in ("model_name_or_path", "adapter_name_or_path"):
        if Path(host["export_dir"]).resolve() == Path(host[key]).resolve():
            raise UserError(f"export_dir={host['export_dir']!r} is {key} itself; choose another folder")


def check_datasets(host: Mapping[str, Any]) -> None:
    """Fail early on data sets that are not described, whose local file is missing, or whose columns do not exist.

    Raises:
        UserError: naming the file and the key that is wrong.
    """
    if not host.get("dataset"):
        raise UserError("dataset is required: names from dataset_info.json, separated by commas")
    folder = str(host["dataset_dir"])
    if is_elsewhere(folder):
        return
    info = dataset_info(Path(folder))
    for key in ("dataset", "eval_dataset"):
        for name in _names(host, key):
            if name not in info:
                hint = did_you_mean(name, info)
                file = Path(folder) / "dataset_info.json"
                raise UserError(f"{key}: {name!r} is not in {file}{hint} (known: {', '.join(info)})")
            _check_local_file(Path(folder), name, info[name])


def run_parts(host: Mapping[str, Any], diffusion: DiffusionArguments) -> dict[str, Any]:
    """What a run is made of: its model, its data by content, and the settings that decide what is learned.

    A run continues from a checkpoint only where these are the same.
    """
    parts: dict[str, Any] = {key: host.get(key) for key in IDENTITY}
    left_out = ["eval_seed", "save_dtype", "accept_changes"]
    if diffusion.objective == "masked":  # checkpoints of before there were others say nothing of it
        left_out += BLOCK_SETTINGS
    for field in dataclasses.fields(diffusion):
        if field.name not in left_out:
            parts[f"diffusion.{field.name}"] = getattr(diffusion, field.name)
    model = Path(host["model_name_or_path"])
    parts["model"] = folder_identity(model) if model.is_dir() else str(model)
    folder = str(host["dataset_dir"])
    if is_elsewhere(folder):
        return parts
    info = dataset_info(Path(folder))
    for name in dict.fromkeys(_names(host, "dataset") + _names(host, "eval_dataset")):
        files = []
        if _is_local(info[name]):
            _, paths = data_files(Path(folder) / info[name]["file_name"], name)
            files = [[path.name, file_identity(path, whole=True)] for path in paths]
        parts[f"data {name}"] = [{k: v for k, v in info[name].items() if k != "file_name"}, files]
    return parts


def is_elsewhere(folder: str) -> bool:
    """Whether a `dataset_dir` is one of LLaMA-Factory's names for data sets that no folder here describes."""
    return folder == "ONLINE" or folder.startswith("REMOTE:")


def dataset_info(folder: Path) -> dict[str, Any]:
    """The descriptions of data sets in a folder's `dataset_info.json`, by their names.

    Raises:
        UserError: the file is missing, cannot be read, or holds something else.
    """
    file = folder / "dataset_info.json"
    if not file.is_file():
        raise UserError(f"dataset_dir={str(folder)!r}: {file.absolute()} not found")
    try:
        info = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.absolute()} cannot be read: {error}") from error
    if not isinstance(info, dict) or not all(isinstance(entry, dict) for entry in info.values()):
        raise UserError(f"{file.absolute()} must hold one object for each data set, by its name")
    return info


def _names(host: Mapping[str, Any], key: str) -> list[str]:
    """Names of data sets in a setting: a list, or text with commas."""
    value = host.get(key) or ""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def _is_local(entry: Mapping[str, Any]) -> bool:
    return "file_name" in entry and not any(f"{hub}_hub_url" in entry for hub in ("hf", "ms", "om"))


def _check_local_file(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Check the entry of a data set and, where it names local JSON or CSV files, their first records."""
    layout = Layout.of(name, entry)
    known = ["formatting", "ranking", "columns", "tags", *ENTRY, *PLACES]
    for key, value in entry.items():
        if key not in known:
            hint = did_you_mean(key, known)
            raise UserError(f"dataset {name!r}: unknown key {key!r}{hint} (known: {', '.join(known)})")
        if key == "num_samples" and value is not None and (type(value) is not int or value < 1):
            raise UserError(f"dataset {name!r}: num_samples must be a positive integer, got {value!r}")
        if key in (*ENTRY[1:], *PLACES) and not isinstance(value, str | None):
            raise UserError(f"dataset {name!r}: {key} must be text, got {value!r}")
    if not any(entry.get(key) for key in PLACES):
        raise UserError(f"dataset {name!r}: dataset_info.json says not where it is: give one of {', '.join(PLACES)}")
    if not _is_local(entry):
        return
    kind, files = data_files(folder / entry["file_name"], name)
    if kind not in READ_HERE:
        return
    num_records, problems = 0, []
    columns: set[str] = set()
    for place, text, problem in itertools.islice(itertools.chain.from_iterable(map(read_records, files)), LOOKED_AT):
        num_records += 1
        fate = parse_record(layout, text, problem)["fate"]
        if fate.startswith(MALFORMED):
            problems.append((place, fate))
        else:
            columns |= json.loads(text).keys()
    if not num_records:
        raise UserError(f"dataset {name!r}: {', '.join(str(file.absolute()) for file in files)} is empty")
    refuse_malformed(name, num_records, problems)
    named = entry.get("columns") or {}
    missing = [f"{key}={column!r}" for key, column in named.items() if column is not None and column not in columns]
    if missing:
        raise UserError(
            f"dataset {name!r}: no record has the columns {', '.join(missing)} of dataset_info.json "
            f"(they have {', '.join(map(repr, sorted(columns)))})"
        )
