"""From a Qwen3, Qwen2 or Llama network to a CoDA model with the same weights, autoregressive or of a published family.

Not here: what is known of the families (`families`), files and command lines (`save_hf_model.py` writes folders,
pre-training starts from them directly).
"""

import logging
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from .configuration_coda import CoDAConfig, reading_config, token_ids
from .errors import UserError
from .families import AUTOREGRESSIVE_TYPES, family_of
from .loading_coda import EMBEDDING_WEIGHT, HEAD_WEIGHT
from .modeling_coda import CoDALanguageModel
from .prompts import CHATML_TEMPLATE
from .run_files import read_json
from .weight_files import check_weights, refuse_not_finite, weight_files

logger = logging.getLogger(__name__)

DEFAULT_MASK_TOKEN = "<|mask|>"
# Tokens that the known families keep for padding, in the order in which they are taken.
PAD_TOKENS = ("<|endoftext|>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<unk>")


def coda_config_of(source: PreTrainedConfig) -> dict[str, Any]:
    """Give the `CoDAConfig` arguments that make the same network as an autoregressive config, token ids aside.

    Raises:
        UserError: a type without a CoDA counterpart, or attention windows in use.
    """
    if source.model_type not in AUTOREGRESSIVE_TYPES:
        supported = ", ".join((CoDAConfig.model_type, *AUTOREGRESSIVE_TYPES))
        raise UserError(f"model_type must be one of {supported}, got {source.model_type!r}")
    windowed = [kind for kind in getattr(source, "layer_types", None) or () if kind != "full_attention"]
    if windowed:
        raise UserError(
            f"sliding windows must be off (use_sliding_window: false), got {len(windowed)} of "
            f"{source.num_hidden_layers} layers with {windowed[0]}: CoDA attends to the whole canvas in every layer"
        )
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings attention_dropout bos_token_id"
    ).split()
    arguments = {name: getattr(source, name) for name in same}
    arguments["head_dim"] = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    arguments["rope_parameters"] = dict(source.rope_parameters)
    has_bias = source.model_type == "qwen2" or bool(source.attention_bias)
    return arguments | {
        "attention_bias": has_bias,
        "attention_output_bias": has_bias and source.model_type != "qwen2",
        "mlp_bias": bool(getattr(source, "mlp_bias", False)),
        "qk_norm": source.model_type == "qwen3",
        "logits_shift": True,
    }


def load_source(folder: Path, gguf: dict[str, str]) -> tuple[torch.nn.Module, torch.dtype]:
    """Load a CoDA model, an autoregressive one or one of a published family in float32; also give its stored dtype.

    The last comes as transformers' own class of the same network. No code of the folder's own is run.

    Raises:
        UserError: unsupported type, broken or quantised files, or weights that are missing, left over, of another
            shape or not finite.
    """
    check_weights(folder, gguf.get("gguf_file"))
    arguments: dict[str, Any] = dict(gguf)
    if gguf:
        config = _gguf_config(folder, gguf)
    else:
        values = read_json(folder / "config.json")
        if values.get("model_type") == CoDAConfig.model_type:
            model = CoDALanguageModel.from_pretrained(folder, dtype=torch.float32)
            refuse_not_finite(model.named_parameters(), str(folder))
            return model.eval(), _stored_dtype(model.config, folder)
        family = family_of(values)
        with reading_config():
            config = AutoConfig.from_pretrained(folder) if family.is_autoregressive else family.config(values)
        arguments["config"] = config
        arguments["key_mapping"] = {re.escape(part): own for part, own in family.weights.items()}
    pad = config.pad_token_id
    if pad is not None and not 0 <= pad < config.vocab_size:
        # transformers would look for its row in the embedding; the network has no use for it.
        logger.info("padding: the tokenizer's, not the configuration's %d: there are %d rows", pad, config.vocab_size)
        config.pad_token_id, arguments["config"] = None, config
    CoDAConfig(**coda_config_of(config))  # refuse before the weights are read
    # Mismatched sizes are let through here to be named with the other faults below.
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
    )
    # A GGUF file also holds tables that its loader turns into buffers; they are no weights.
    kinds = ("missing_keys", "mismatched_keys") if gguf else ("missing_keys", "unexpected_keys", "mismatched_keys")
    faults = {kind: sorted(map(str, info[kind])) for kind in kinds if info.get(kind)}
    if faults:
        report = "; ".join(f"{len(keys)} {kind.replace('_', ' ')}: {keys[:5]}" for kind, keys in faults.items())
        raise UserError(f"the weights of {str(folder)!r} do not fit its config.json: {report}")
    refuse_not_finite(model.named_parameters(), str(folder))
    # A head that differs from the embedding stays what it is, whatever the config says.
    model.config.tie_word_embeddings = model.lm_head.weight is model.model.embed_tokens.weight
    return model.eval(), _stored_dtype(config, folder)


def _gguf_config(folder: Path, gguf: dict[str, str]) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, **gguf)  # it reads the table of tensors too
    except (ValueError, IndexError, struct.error) as error:
        file = str(folder / gguf["gguf_file"])
        raise UserError(f"{file!r} is not a whole GGUF file, or one that cannot be read: {error}") from error


def _stored_dtype(config: PreTrainedConfig, folder: Path) -> torch.dtype:
    """What the config says, else what the first weight has; float32 where neither tells."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as weights:
                return weights.get_slice(min(weights.keys()))[:1].dtype
    return torch.float32


def number_of_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of ids up to the largest one that the tokenizer defines."""
    return max(tokenizer.get_vocab().values()) + 1


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, mask_token: str | None) -> None:
    """Give the tokenizer, in place, what decoding needs: mask, end and padding tokens, and a chat template.

    The end token is the end of a chat turn where the vocabulary has one (`<|im_end|>`). Padding is never the end
    token, since a model must be able to learn where an answer ends.
    """
    vocabulary = tokenizer.get_vocab()
    mask_token = mask_token or tokenizer.mask_token or DEFAULT_MASK_TOKEN
    logger.info("mask token: %s (%s)", mask_token, "of the tokenizer" if mask_token in vocabulary else "added")
    tokenizer.add_special_tokens({"mask_token": mask_token})

    speaks_chatml = "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary
    if speaks_chatml and tokenizer.eos_token != "<|im_end|>":
        logger.info("end token: <|im_end|>, the end of a chat turn, instead of %s", tokenizer.eos_token)
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})

    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        taken = (tokenizer.eos_token, mask_token)
        candidates = (*PAD_TOKENS, tokenizer.unk_token)
        pad_token = next((t for t in candidates if t in vocabulary and t not in taken), "<|pad|>")
        logger.info("padding token: %s (%s)", pad_token, "of the tokenizer" if pad_token in vocabulary else "added")
        tokenizer.add_special_tokens({"pad_token": pad_token})

    if tokenizer.chat_template is None and speaks_chatml:
        logger.info("chat template: ChatML (the tokenizer has its tokens and no template)")
        tokenizer.chat_template = CHATML_TEMPLATE


def grow_vocabulary(weights: dict[str, Tensor], num_rows: int) -> dict[str, Tensor]:
    """Add rows to embedding and head until they have `num_rows`; a new row is the mean of the existing ones."""
    grown = dict(weights)
    for name in (EMBEDDING_WEIGHT, HEAD_WEIGHT):
        rows = grown.get(name)
        if rows is not None and len(rows) < num_rows:
            mean = rows.mean(dim=0, keepdim=True)
            grown[name] = torch.cat([rows, mean.expand(num_rows - len(rows), -1)])
    return grown


def build_model(
    source: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any] | None = None
) -> CoDALanguageModel:
    """Put the weights of `source` into a CoDA model whose ids are those of the tokenizer. float32.

    Args:
        source: as `load_source` gives it.
        tokenizer: complete, see `complete_tokenizer`.
        settings: arguments of `CoDAConfig` that go before those of the source and the tokenizer.

    Raises:
        UserError: a CoDA source was trained with another mask id.
    """
    is_coda = source.config.model_type == CoDAConfig.model_type
    if is_coda and source.config.mask_token_id != tokenizer.mask_token_id:
        raise UserError(
            f"mask_token_id must be {source.config.mask_token_id}, which the model was trained with, got "
            f"{tokenizer.mask_token_id} ({tokenizer.mask_token}): pass the tokenizer of the training with --tokenizer, "
            "or its mask token with --mask_token"
        )
    arguments = source.config.to_dict() if is_coda else coda_config_of(source.config)
    ends = token_ids(arguments["eos_token_id"]) if is_coda else []
    num_token_ids = number_of_ids(tokenizer)
    num_rows = max(arguments["vocab_size"], num_token_ids)
    spare, grown = arguments["vocab_size"] - num_token_ids, num_rows - arguments["vocab_size"]
    logger.info("vocabulary: %d ids, %d spare rows, %d rows added", num_token_ids, max(spare, 0), grown)
    arguments |= {
        "vocab_size": num_rows,
        "num_token_ids": num_token_ids,
        "mask_token_id": tokenizer.mask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": arguments["eos_token_id"] if tokenizer.eos_token_id in ends else tokenizer.eos_token_id,
    } | dict(settings or {})
    for written_anew in ("auto_map", "architectures", "transformers_version", "dtype", "model_type"):
        arguments.pop(written_anew, None)
    with torch.device("meta"):
        model = CoDALanguageModel(CoDAConfig(**arguments))
    weights = grow_vocabulary(source.state_dict(), num_rows)
    if model.config.tie_word_embeddings:
        weights[HEAD_WEIGHT] = weights[EMBEDDING_WEIGHT]
    model.load_state_dict(weights, assign=True, strict=True)
    cast_weights(model, torch.float32)
    model.tie_weights()
    return model.eval()


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What weights may be written in, by the name that a user gives."""


def cast_weights(model: CoDALanguageModel, dtype: torch.dtype) -> None:
    """Cast the weights in place. The tables of the rotary embedding are no weights and stay float32, as when loaded."""
    model.to(dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
