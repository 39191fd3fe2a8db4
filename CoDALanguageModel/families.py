"""Published families: what is known of their checkpoints, one row each, and what a folder of theirs says of itself.

The network of each is one that transformers has (Qwen3, Qwen2, Llama); what differs is who may attend to whom, which
row scores a token, the mask token, and the names in its files. No code of a folder is run.

Not here: weights (`conversion` loads them), files and command lines (`save_hf_model.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from .config_fields import check_fields
from .configuration_coda import CoDAConfig
from .errors import UserError
from .run_files import read_json

AUTOREGRESSIVE_TYPES = ("qwen3", "qwen2", "llama")

# Keys of a config.json that say what this network has not, with the name of it.
FOREIGN_PARTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"), "experts"),
    **dict.fromkeys(("vision_config", "mm_vision_tower", "image_token_index", "image_token_id"), "images"),
    **dict.fromkeys(("audio_config", "use_mrope"), "positions of more than one axis, or sound"),
}
# Without these a network would get sizes that its folder does not state.
NEEDED_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings "
    "rms_norm_eps rope_theta"
).split()
# What a config.json says of the program that wrote it and not of the network.
BOOKKEEPING = (
    *("model_type", "auto_map", "architectures", "transformers_version", "_name_or_path"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Checkpoints that say the same of themselves and leave out the same."""

    title: str
    """Name for people."""

    model_type: str
    """As in config.json."""

    backbone: str
    """Type of transformers' own class that computes the same: one of `AUTOREGRESSIVE_TYPES`."""

    marks: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json, with their values, that tell this family from others of its `model_type`."""

    logits_shift: bool = True
    """The contract: shifted, or same position; see `CoDAConfig`."""

    attention: str | None = None
    """As in `CoDAConfig`. None: one type stands for both kinds, and the caller must say which."""

    block_size_key: str | None = None
    """Key of config.json that holds the tokens per block."""

    block_size: int | None = None
    """Tokens per block where no key says otherwise. None: the caller must say."""

    block_origin: str = "text"
    """As in `CoDAConfig`."""

    schedule: str = "even"
    """Of its own sampler; see the decoding setting of that name."""

    mask_token: str | None = None
    """Text of the mask token in the published vocabulary."""

    mask_token_id: int | None = None
    """Its id there; a config.json that names another is right."""

    keys: Mapping[str, str] = field(default_factory=dict)
    """Keys of config.json that the backbone's configuration has under another name."""

    required: Mapping[str, tuple] = field(default_factory=dict)
    """Keys of config.json whose other values mean another network; None stands for an absent key."""

    weights: Mapping[str, str] = field(default_factory=dict)
    """Parts of weight names and what the backbone has for them, replaced one after another."""

    @property
    def is_autoregressive(self) -> bool:
        """Whether the type is that of autoregressive models: attention and blocks are then the caller's choice."""
        return self.model_type == self.backbone and not self.marks

    def settings(
        self,
        values: Mapping[str, Any],
        *,
        attention: str | None = None,
        block_size: int | None = None,
        block_origin: str | None = None,
    ) -> dict[str, Any]:
        """The arguments of `CoDAConfig` that say who may attend to whom and which row scores a token.

        Args:
            values: of the folder's config.json.
            attention: the caller's word, as below: fills what the folder leaves out and may not contradict it.
            block_size: tokens per block.
            block_origin: where blocks are counted from.

        Raises:
            UserError: the caller contradicts the folder or the family, or says too little.
        """
        known = (None, None) if self.is_autoregressive else (self.attention, self.block_origin)
        published = f"the {self.title} family has"
        attention = _settled("attention", known[0], attention, published)
        if attention is None and not self.is_autoregressive:
            raise UserError(
                f"attention must be given with --attention, full or block_causal: a {self.title} folder does not say "
                "which of the two it was trained with"
            )
        if attention in (None, "full"):
            if (block_size, block_origin) != (None, None):
                raise UserError(
                    f"--block_size and --block_origin go with --attention block_causal alone, got block_size "
                    f"{block_size!r} and block_origin {block_origin!r} with attention 'full'"
                )
            return {"attention": "full", "logits_shift": self.logits_shift}
        key = self.block_size_key
        stated = None if key is None else values.get(key)
        block_size = _settled("block_size", stated, block_size, f"{key} in config.json says")
        block_size = self.block_size if block_size is None else block_size
        if block_size is None:
            raise UserError(
                "block_size must be given with --block_size, the number of tokens per block that the model was trained "
                f"with: its config.json has no {key or 'key for it'}"
            )
        block_origin = _settled("block_origin", known[1], block_origin, published) or self.block_origin
        return {
            "attention": attention,
            "block_size": block_size,
            "block_origin": block_origin,
            "logits_shift": self.logits_shift,
        }

    def config(self, values: Mapping[str, Any]) -> PreTrainedConfig:
        """The configuration of transformers' own class for the same network.

        Raises:
            UserError: config.json lacks a size, or describes another network than the family's.
        """
        for key, allowed in self.required.items():
            if values.get(key) not in allowed:
                names = ", ".join("absent" if value is None else repr(value) for value in allowed)
                raise UserError(
                    f"{key} in config.json must be {names} for a {self.title} model, got {values.get(key)!r}: another "
                    "network than the one that is known here"
                )
        renamed = {name: values[key] for key, name in self.keys.items() if values.get(key) is not None}
        same = {key: value for key, value in values.items() if key not in (*self.keys, *BOOKKEEPING)}
        arguments = same | renamed
        check_fields(arguments)
        own_names = {name: key for key, name in self.keys.items()}
        for name in NEEDED_KEYS:
            has_rope = name == "rope_theta" and "rope_theta" in (values.get("rope_parameters") or ())
            if arguments.get(name) is None and not has_rope:
                raise UserError(f"config.json of a {self.title} model must hold {own_names.get(name, name)}")
        return AutoConfig.for_model(self.backbone, **arguments)


def _settled(name: str, known: Any, given: Any, who: str) -> Any:
    if known is not None and given is not None and given != known:
        raise UserError(f"--{name} must be {known}, as {who}, got {given}")
    return known if given is None else given


A2D = {
    "title": "dLLM Tiny-A2D",
    "logits_shift": False,
    "block_size": 32,
    "block_origin": "answer",  # prompts are padded on the left to whole blocks
    "mask_token": "<|mask|>",
}
EFFICIENT_DLM = {
    "title": "Efficient-DLM",
    "model_type": "qwen3",
    "backbone": "qwen3",
    "attention": "block_causal",
    "block_size_key": "block_size",
    "block_size": 32,
    "block_origin": "answer",
    "mask_token": "<|fim_pad|>",
    "mask_token_id": 151662,
}
FAMILIES = (
    Family(title="Qwen3", model_type="qwen3", backbone="qwen3"),
    Family(title="Qwen2", model_type="qwen2", backbone="qwen2"),
    Family(title="Llama", model_type="llama", backbone="llama"),
    Family(
        title="Dream",
        model_type="Dream",
        backbone="qwen2",
        attention="full",
        schedule="published",
        mask_token="<|mask|>",
        mask_token_id=151666,
        required={"block_size": (None,)},  # a successor that goes by blocks calls itself Dream too
    ),
    Family(model_type="a2d-qwen3", backbone="qwen3", mask_token_id=151669, **A2D),
    Family(model_type="a2d-qwen2", backbone="qwen2", **A2D),
    Family(model_type="a2d-llama", backbone="llama", **A2D),
    Family(
        title="SDAR",
        model_type="sdar",
        backbone="qwen3",
        logits_shift=False,
        attention="block_causal",
        block_size_key="block_size",
        mask_token="<|MASK|>",
        mask_token_id=151669,
    ),
    Family(
        title="Fast-dLLM v2",
        model_type="Fast_dLLM_Qwen",
        backbone="qwen2",
        attention="block_causal",
        block_size_key="bd_size",
        mask_token="|<MASK>|",
        mask_token_id=151665,
    ),
    Family(marks={"dlm_type": "llada"}, logits_shift=False, **EFFICIENT_DLM),
    Family(marks={"dlm_type": "dream"}, logits_shift=True, **EFFICIENT_DLM),
    Family(
        title="LLaDA",
        model_type="llada",
        backbone="llama",
        logits_shift=False,
        attention="full",
        mask_token="<|mdm_mask|>",
        mask_token_id=126336,
        keys={
            "d_model": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "n_kv_heads": "num_key_value_heads",
            "mlp_hidden_size": "intermediate_size",
            "max_sequence_length": "max_position_embeddings",
            "embedding_size": "vocab_size",
            "activation_type": "hidden_act",
            "init_std": "initializer_range",
            "weight_tying": "tie_word_embeddings",
        },
        required={
            "block_type": ("llama",),
            "layer_norm_type": ("rms",),
            "activation_type": ("silu",),
            "rope": (True,),
            **dict.fromkeys(
                "alibi attention_layer_norm bias_for_layer_norm include_bias include_qkv_bias input_emb_norm "
                "multi_query_attention scale_logits".split(),
                (False, None),
            ),
            "layer_norm_with_affine": (True, None),
        },
        weights={
            "model.transformer.wte.": "model.embed_tokens.",
            "model.transformer.ln_f.": "model.norm.",
            "model.transformer.ff_out.": "lm_head.",
            "model.transformer.blocks.": "model.layers.",
            ".attn_norm.": ".input_layernorm.",
            ".ff_norm.": ".post_attention_layernorm.",
            ".q_proj.": ".self_attn.q_proj.",
            ".k_proj.": ".self_attn.k_proj.",
            ".v_proj.": ".self_attn.v_proj.",
            ".attn_out.": ".self_attn.o_proj.",
            ".ff_proj.": ".mlp.gate_proj.",
            ".up_proj.": ".mlp.up_proj.",
            ".ff_out.": ".mlp.down_proj.",
        },
    ),
)
"""Sources: the families' own descriptions and configuration classes. Unlike the other values, the keys of Efficient-DLM
were not seen in a folder of it."""


def family_of(values: Mapping[str, Any]) -> Family:
    """The family of a folder, by its config.json.

    Raises:
        UserError: no family that is known, or a part that this network has not.
    """
    model_type = values.get("model_type")
    rows = [row for row in FAMILIES if row.model_type == model_type]
    if not rows:
        supported = ", ".join(dict.fromkeys((CoDAConfig.model_type, *(row.model_type for row in FAMILIES))))
        raise UserError(f"model_type must be one of {supported}, got {model_type!r}")
    for key, part in FOREIGN_PARTS.items():
        if values.get(key):
            raise UserError(f"{key} must be absent from config.json, got {values[key]!r}: {part} have no place here")
    check_fields(values)
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if "mrope_section" in rope:
        raise UserError(f"mrope_section must be absent from config.json, got {dict(rope)!r}")
    for key in {key: None for row in rows for key in row.marks}:
        if key in values:
            found = [row for row in rows if row.marks.get(key) == values[key]]
            if not found:
                allowed = ", ".join(str(row.marks[key]) for row in rows if key in row.marks)
                raise UserError(f"{key} in config.json must be one of {allowed}, got {values[key]!r}")
            return found[0]
    return next(row for row in rows if not row.marks)


def find_mask_token(
    family: Family, values: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, num_rows: int, asked: str | None
) -> str:
    """Text of the mask token that the weights of a published family were trained with.

    Its id is what config.json says, else the tokenizer, else the published vocabulary.

    Args:
        family: of the folder.
        values: of its config.json.
        tokenizer: of the model. It may not name its mask token, and may lack one whose id is the next that is free.
        num_rows: of the embedding.
        asked: the caller's word for it.

    Raises:
        UserError: it cannot be found, has no row in the embedding, or the caller says another.
    """
    vocabulary = tokenizer.get_vocab()
    texts = {token_id: text for text, token_id in vocabulary.items()}
    largest = max(texts)
    named = next((text for text in (tokenizer.mask_token, family.mask_token, asked) if text in vocabulary), None)
    if values.get("mask_token_id") is not None:
        mask_id, who = values["mask_token_id"], "config.json says"
    elif named is not None:
        mask_id, who = vocabulary[named], "the tokenizer says"
    else:
        mask_id, who = family.mask_token_id, "it is published"
        texts.pop(mask_id, None)  # a token of that id has another text, so that it belongs to another vocabulary
    if mask_id is None:
        raise UserError(f"--mask_token must name the mask token that the {family.title} model was trained with")
    text = texts.get(mask_id)
    if text is None and mask_id == len(vocabulary) == largest + 1:  # where a token that is added comes
        text = family.mask_token or asked
    if text is None or mask_id >= num_rows:
        raise UserError(
            f"the mask token has the id {mask_id}, as {who}: the tokenizer must define it and the model have a row for "
            f"it, got ids up to {largest} and {num_rows} rows. Pass the model's own tokenizer with --tokenizer"
        )
    if asked not in (None, text):
        raise UserError(f"--mask_token must be {text!r} (id {mask_id}), as {who}, got {asked!r}")
    return text


def published_ends(
    folder: Path, values: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, num_rows: int, *, with_padding: bool
) -> list[int]:
    """Ids that end an answer in a published folder: its end tokens, and its padding where that ends answers too.

    Masked-diffusion models fill the rest of a canvas with padding, and autoregressive ones end documents with it, so
    that it has to be a token like others.

    Args:
        folder: the published one.
        values: of its config.json.
        tokenizer: its own, as it lies there.
        num_rows: of its embedding. Padding without a row is never written, and so ends nothing.
        with_padding: whether padding counts.

    Raises:
        UserError: generation_config.json is not valid JSON, or an end token is no id or has no row.
    """
    file = folder / "generation_config.json"
    sources: dict[str, Mapping[str, Any]] = {
        "config.json": values,
        file.name: read_json(file) if file.is_file() else {},
        "the tokenizer": {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
    }
    ends: dict[int, None] = {}
    for name in ("eos_token_id", "pad_token_id") if with_padding else ("eos_token_id",):
        for where, source in sources.items():
            setting = source.get(name)
            ids = setting if isinstance(setting, list) else [] if setting is None else [setting]
            if any(type(token_id) is not int for token_id in ids):
                raise UserError(f"{where}: {name} must be a token id, a list of them or null, got {setting!r}")
            beyond = [token_id for token_id in ids if token_id >= num_rows]
            if beyond and name == "eos_token_id":
                raise UserError(f"{where}: {name} must be in [0, {num_rows}), the rows of the model, got {beyond[0]}")
            ends |= dict.fromkeys(i for i in ids if 0 <= i < num_rows)  # -1 is none in older folders of Llama
    return list(ends)
