"""The network that a run starts from: weights of a folder, or random ones that depend on the seed alone.

A folder is a CoDA one or an autoregressive Qwen3, Qwen2 or Llama one, whose weights are kept and whose tokenizer gets
the mask and pad tokens it lacks.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from CoDALanguageModel import CoDAConfig, CoDALanguageModel
from CoDALanguageModel.conversion import (
    AUTOREGRESSIVE_TYPES,
    build_model,
    complete_tokenizer,
    load_source,
    number_of_ids,
)
from CoDALanguageModel.diffusion import named_rng
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.families import FAMILIES, family_of, published_ends
from CoDALanguageModel.noise import Blocks, blocks_to_train
from CoDALanguageModel.run_files import read_json
from CoDALanguageModel.weight_files import read_tokenizer, refuse_not_finite

from ..config import ModelConfig, RunConfig
from ..data.tokenization import load_tokenizer

logger = logging.getLogger(__name__)


def load_tokenizer_folder(folder: str, *, complete: bool = False) -> PreTrainedTokenizerBase:
    """Load the run's tokenizer.

    Args:
        folder: `model.tokenizer`.
        complete: add the mask and pad tokens that an autoregressive model's tokenizer lacks.

    Raises:
        UserError: the folder is missing or holds no tokenizer, or it has no mask or no pad token.
    """
    if not Path(folder).is_dir():
        raise UserError(f"model.tokenizer: no folder at {folder!r}")
    try:
        tokenizer = read_tokenizer(folder)
    except UserError as error:
        raise UserError(f"model.tokenizer {folder!r}: {error}") from error
    if complete:
        complete_tokenizer(tokenizer, None)
    for name in ("mask_token", "pad_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise UserError(
                f"model.tokenizer {folder!r} has no {name}; masked diffusion needs one: name it in its config "
                "(what is missing is added when model.init_from is an autoregressive folder)"
            )
    return tokenizer


def initial_model(config: ModelConfig, *, seed: int) -> CoDALanguageModel:
    """Build the network on the CPU in float32, in training mode. Of what an autoregressive one was, its weights stay.

    Raises:
        UserError: a missing folder, a folder of another model type, unknown fields, or ids that the tokenizer does
            not agree with.
    """
    if config.init_from is not None:
        model_type = _type_of(config.init_from)
        tokenizer = load_tokenizer_folder(config.tokenizer, complete=model_type in AUTOREGRESSIVE_TYPES)
        if model_type in AUTOREGRESSIVE_TYPES:
            model = _from_autoregressive(config, tokenizer)
        else:
            model = _from_folder(config)
    else:
        assert config.config is not None, "ModelConfig holds init_from or config"
        tokenizer = load_tokenizer_folder(config.tokenizer)
        shape = coda_config(config.config, tokenizer)
        shape._attn_implementation = config.attn_implementation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(named_rng("initial weights", seed).integers(2**63)))
            model = CoDALanguageModel(shape)
    change_facts(model.config, config.changed_facts)
    _check_tokens(model.config, tokenizer, config.tokenizer)
    return model.float().train()


def _type_of(folder: str) -> str:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"model.init_from: no model folder (with a config.json) at {folder!r}")
    values = read_json(path)
    model_type, supported = values.get("model_type"), (CoDAConfig.model_type, *AUTOREGRESSIVE_TYPES)
    if model_type not in (*supported, *(family.model_type for family in FAMILIES)):
        raise UserError(
            f"model.init_from {folder!r} must be a folder of type {', '.join(supported)}, got model_type {model_type!r}"
        )
    if model_type != CoDAConfig.model_type:
        family = family_of(values)
        if not family.is_autoregressive:
            raise UserError(
                f"model.init_from {folder!r} is of the {family.title} family: convert it with save_hf_model.py, and "
                "start from what that makes"
            )
    return model_type


def _from_folder(config: ModelConfig) -> CoDALanguageModel:
    assert config.init_from is not None, "the caller checks"
    try:
        model = CoDALanguageModel.from_pretrained(
            config.init_from, dtype=torch.float32, attn_implementation=config.attn_implementation
        )
        refuse_not_finite(model.named_parameters(), "the folder")
    except (ValueError, OSError) as error:
        raise UserError(f"model.init_from {config.init_from!r}: {error}") from error
    return model


def _from_autoregressive(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> CoDALanguageModel:
    assert config.init_from is not None, "the caller checks"
    try:
        source, _ = load_source(Path(config.init_from), {})
        own = read_tokenizer(config.tokenizer)  # without what is changed here
        known = number_of_ids(own)
        if known > source.config.vocab_size:
            raise UserError(
                f"it has {source.config.vocab_size} rows, fewer than the {known} ids of model.tokenizer "
                f"{config.tokenizer!r}"
            )
        values = read_json(Path(config.init_from, "config.json"))
        ends = published_ends(Path(config.init_from), values, own, source.config.vocab_size, with_padding=False)
        ids = list(dict.fromkeys([tokenizer.eos_token_id, *ends]))
        model = build_model(source, tokenizer, {"eos_token_id": ids} if len(ids) > 1 else {})
    except (ValueError, OSError) as error:
        raise UserError(f"model.init_from {config.init_from!r}: {error}") from error
    model.set_attn_implementation(config.attn_implementation)
    logger.info("the weights of %s, a %s model, start the run", config.init_from, source.config.model_type)
    return model


def coda_config(fields: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> CoDAConfig:
    """`CoDAConfig` of the given fields; token ids and vocabulary size come from the tokenizer unless given."""
    known = set(CoDAConfig().to_dict()) | {"rope_theta"}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise UserError(f"unknown key model.config.{unknown[0]} (not a field of CoDAConfig; known: {sorted(known)})")
    from_tokenizer = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,  # a multiple of 64, as matrix units and meshes like it
        "num_token_ids": len(tokenizer),
        "mask_token_id": tokenizer.mask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return CoDAConfig(**{**from_tokenizer, **fields})


def _check_tokens(config: CoDAConfig, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    for name in ("mask_token_id", "pad_token_id"):
        if getattr(config, name) != getattr(tokenizer, name):
            raise UserError(
                f"the model's {name} is {getattr(config, name)}, but model.tokenizer {folder!r} says "
                f"{getattr(tokenizer, name)}"
            )
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"model.tokenizer {folder!r} has {len(tokenizer)} tokens, more than the model's vocab_size "
            f"{config.vocab_size}"
        )


def change_facts(config: CoDAConfig, facts: dict[str, Any]) -> None:
    """Give the model other attention than its folder says.

    Raises:
        UserError: the facts do not go together.
    """
    if facts.get("attention") == "full":
        facts = {"block_size": None, "block_origin": "text", "causal_context": False, **facts}
    checked = CoDAConfig(**{**config.to_dict(), **facts}) if facts else config
    for name in facts:
        setattr(config, name, getattr(checked, name))


def blocks_of(config: RunConfig, model: CoDAConfig) -> Blocks | None:
    """The blocks that a run ends with; None for a model of full attention. `joint` makes its context causal.

    Raises:
        UserError: the objective is not one of the model's attention, or blocks do not fit the rows.
    """
    if config.by_blocks != model.has_blocks:
        remedy = "objective 'block' or 'joint'" if model.has_blocks else "model.attention=block_causal and a block_size"
        raise UserError(
            f"objective {config.objective!r} needs a model with attention "
            f"{'block_causal' if config.by_blocks else 'full'!r}, got {model.attention!r}: set {remedy}"
        )
    if not config.by_blocks:
        return None
    assert model.block_size is not None, "CoDAConfig checks"
    if model.block_size > config.seq_len:
        raise UserError(f"the model's block_size must be at most seq_len {config.seq_len}, got {model.block_size}")
    config.blocks.check_growth(model.block_size)
    own = config.blocks
    return blocks_to_train(model, complementary=own.complementary, autoregressive_weight=own.autoregressive_weight)


def check_shards(shards: dict[str, Any], config: CoDAConfig, tokenizer_dir: str) -> None:
    """Compare what token shards say about their tokenizer with the run's model and tokenizer.

    Args:
        shards: the tokenizer facts of the shards' manifests (`Mixture.tokenizer`).
        config: the model's.
        tokenizer_dir: `model.tokenizer`.

    Raises:
        UserError: the shards may hold ids that the model has no row for.
    """
    if shards["vocab_size"] > config.vocab_size:
        raise UserError(
            f"the token shards were made with a tokenizer of {shards['vocab_size']} ids, more than the model's "
            f"vocab_size {config.vocab_size}: prepare them with model.tokenizer {tokenizer_dir!r}"
        )
    if load_tokenizer(tokenizer_dir, shards["document_end"]).fingerprint != shards["fingerprint"]:
        logger.warning(
            "the token shards were made with another tokenizer than model.tokenizer %r; that is right only if both "
            "give ordinary text the same ids, as when a mask token was added later",
            tokenizer_dir,
        )
