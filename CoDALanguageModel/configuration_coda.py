"""Architecture of a CoDA model: shapes, token ids and conventions. Nothing about training or decoding."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, Qwen3Config
from transformers.activations import ACT2FN

from .config_fields import check_fields
from .errors import UserError, did_you_mean

# Keys that the published checkpoint carries in its config.json: training settings, no part of the architecture.
LEGACY_KEYS = (
    "attention_kernel",
    "block_masking_probability",
    "mask_block_sizes",
    "prefix_probability",
    "sampling_eps",
    "truncate_probability",
)

# Qwen's embedding has 151,936 rows, but its tokenizer with the mask token defines only the ids below this one.
QWEN_VOCAB_SIZE, QWEN_MASK_TOKEN_ID, QWEN_NUM_TOKEN_IDS = 151936, 151669, 151670


def token_ids(setting: int | Sequence[int] | None) -> list[int]:
    """A setting that names one token, several or none, as a list."""
    return [] if setting is None else [setting] if isinstance(setting, int) else list(setting)


@contextmanager
def reading_config() -> Iterator[None]:
    """Tell what transformers finds wrong with the fields of a config.json that are its own.

    Raises:
        UserError: naming the field, what is allowed and the value got.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__name__.startswith("StrictDataclass"):  # a class that transformers has from elsewhere
            raise
        raise UserError("config.json: " + " ".join(str(error).split())) from error


def check_activation(name: str) -> None:
    """Refuse an activation that transformers does not have.

    Raises:
        UserError: with those that it has.
    """
    if name not in ACT2FN:
        raise UserError(f"hidden_act must be one of {', '.join(ACT2FN)}, got {name!r}{did_you_mean(name, ACT2FN)}")


class DefaultId(int):
    """An id of Qwen's vocabulary that nobody asked for: it gives way where a vocabulary does not hold it."""


class CoDAConfig(PreTrainedConfig):
    """Configuration of `CoDALanguageModel`; the defaults are the published 1.7B model (Qwen3-1.7B).

    Args:
        vocab_size: rows of the embedding and of the head.
        hidden_size: width of the residual stream; need not equal `num_attention_heads * head_dim`.
        intermediate_size: width of the MLP.
        num_hidden_layers: number of layers.
        num_attention_heads: number of query heads, H.
        num_key_value_heads: number of key and value heads, H_kv; divides H.
        head_dim: size of one head, D. None means `hidden_size // num_attention_heads`.
        hidden_act: activation of the MLP.
        max_position_embeddings: longest canvas (prompt plus new tokens), in tokens.
        initializer_range: standard deviation of the initial weights.
        rms_norm_eps: epsilon of the RMS norms.
        tie_word_embeddings: whether the head is the embedding. Loading follows the weights: a checkpoint whose head
            differs from its embedding stays untied whatever this says.
        rope_parameters: `{"rope_type": ..., "rope_theta": ...}`; the older keys `rope_theta` and `rope_scaling` are
            accepted too.
        attention_bias: bias in the query, key and value projections (Qwen2, some Llama models).
        attention_output_bias: bias in the output projection of the attention (some Llama models).
        mlp_bias: bias in the MLP (some Llama models).
        attention_dropout: dropout of the attention weights while training.
        qk_norm: RMS norm of each query and key head (Qwen3).
        logits_shift: whether row i of the logits scores token i + 1, as in every model that started as an
            autoregressive one; see `diffusion.scored_by`.
        attention: who may attend to whom, `"full"` (all positions to all) or `"block_causal"` (a block to itself and to
            the blocks before it; Arriola et al. 2025, https://arxiv.org/abs/2503.09573).
        block_size: tokens per block, with block-causal attention alone. Blocks of 1 with `logits_shift` are the
            autoregressive model itself.
        block_origin: where blocks are counted from: `"text"`, the start of the text, so that the last block of a prompt
            also holds the first tokens of its answer; or `"answer"`, the first block being as short as the prompt
            needs it. A row that says nothing of an answer is one from its start.
        causal_context: whether blocks before the one that is being filled are read token by token, as objective
            `joint` trains them, and not block by block.
        mask_token_id: id of the mask token, the absorbing state. By default Qwen's, or the last one of a smaller
            vocabulary.
        pad_token_id: id that pads batches. By default Qwen's, or none in a smaller vocabulary, as for the two below.
        bos_token_id: id that starts a text, if any.
        eos_token_id: id or ids that end an answer.
        num_token_ids: ids from this one on have embedding rows but no token; they are never sampled. None means that
            every row has a token (for Qwen's vocabulary: the ids that its tokenizer defines).

    Raises:
        UserError: a field of the wrong kind, a size below 1, head counts that do not divide, no mask token or one that
            means something else too, a token id outside of the vocabulary, or blocks that do not go with the attention.
    """

    model_type = "CoDA"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = Qwen3Config.base_model_tp_plan
    default_theta = 1_000_000.0

    vocab_size: int = QWEN_VOCAB_SIZE
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 40960
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    qk_norm: bool = True
    logits_shift: bool = True
    attention: str = "full"
    block_size: int | None = None
    block_origin: str = "text"
    causal_context: bool = False
    mask_token_id: int = DefaultId(QWEN_MASK_TOKEN_ID)
    pad_token_id: int | None = DefaultId(151643)
    bos_token_id: int | None = DefaultId(151643)
    eos_token_id: int | list[int] | None = DefaultId(151645)
    num_token_ids: int | None = None

    def __post_init__(self, **kwargs):
        for key in LEGACY_KEYS:
            kwargs.pop(key, None)
        kinds = kwargs.pop("layer_types", None)
        if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
            raise UserError(
                f"layer_types must be 'full_attention' alone, or left out: no layer has a window, got {kinds!r}"
            )
        check_fields({**vars(self), **kwargs})
        if kwargs.get("rope_theta") is None:  # which would be taken for the value
            kwargs.pop("rope_theta", None)
        check_activation(self.hidden_act)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        for name in ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id"):
            token_id = getattr(self, name)
            if isinstance(token_id, DefaultId):
                instead = self.vocab_size - 1 if name == "mask_token_id" else None
                setattr(self, name, int(token_id) if token_id < self.vocab_size else instead)
        if self.num_token_ids is None:
            is_qwen = (self.vocab_size, self.mask_token_id) == (QWEN_VOCAB_SIZE, QWEN_MASK_TOKEN_ID)
            self.num_token_ids = QWEN_NUM_TOKEN_IDS if is_qwen else self.vocab_size
        super().__post_init__(**kwargs)
        self._check()
        # A folder saved from this configuration names the code files that lie beside its weights. `AutoTokenizer` reads
        # it first and asks about "AutoConfig", unless trust_remote_code=False is said: without that entry no model of
        # a type that transformers lacks can be loaded, and one that it has would be loaded as another network.
        self.auto_map = {
            "AutoConfig": "configuration_coda.CoDAConfig",
            "AutoModel": "modeling_coda.CoDALanguageModel",
            "AutoModelForCausalLM": "modeling_coda.CoDALanguageModel",
            "AutoModelForMaskedLM": "modeling_coda.CoDAForMaskedLM",
        }

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """The configuration that the fields of a config.json describe.

        Raises:
            UserError: they are of a model of another type, or no configuration.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise UserError(
                f"model_type must be {cls.model_type!r}, got {model_type!r}: save_hf_model.py makes a CoDA folder of "
                "one of another type"
            )
        check_fields(config_dict)  # of which some versions of transformers refuse a part in other words
        with reading_config():
            return super().from_dict(config_dict, **kwargs)

    @property
    def document_start_id(self) -> int | None:
        """Id that stands where a text begins with a gap or is empty; None if there is none."""
        return self.pad_token_id if self.bos_token_id is None else self.bos_token_id

    @property
    def has_blocks(self) -> bool:
        """Whether attention goes by blocks."""
        return self.attention == "block_causal"

    def _check(self) -> None:
        """Refuse shapes, blocks and ids that cannot hold."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "head_dim")
        for name in (*sizes, "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads, "
                f"got {self.num_key_value_heads}"
            )
        if type(self.num_token_ids) is not int or not 0 < self.num_token_ids <= self.vocab_size:
            raise UserError(f"num_token_ids must be in [1, vocab_size={self.vocab_size}], got {self.num_token_ids}")
        self._check_blocks()
        named = [("mask_token_id", self.mask_token_id), ("pad_token_id", self.pad_token_id)]
        ends = self.eos_token_id
        named += [("bos_token_id", self.bos_token_id)]
        named += [("eos_token_id", i) for i in (ends if isinstance(ends, (list, tuple)) else [ends])]
        for name, token_id in named:
            is_missing = token_id is None and name == "mask_token_id"
            is_id = type(token_id) is int and 0 <= token_id < self.vocab_size
            if is_missing or (token_id is not None and not is_id):
                raise UserError(f"{name} must be in [0, vocab_size={self.vocab_size}), got {token_id!r}")
            if token_id == self.mask_token_id and name != "mask_token_id":
                raise UserError(f"{name} must be another than mask_token_id, which never stays, got {token_id!r}")

    def _check_blocks(self) -> None:
        size, longest = self.block_size, self.max_position_embeddings
        if self.has_blocks and (type(size) is not int or not 1 <= size <= longest):
            raise UserError(
                f"block_size must be in [1, max_position_embeddings={longest}] with attention 'block_causal', "
                f"got {size!r}"
            )
        if not self.has_blocks and (size is not None or self.block_origin != "text"):
            raise UserError(
                "block_size and block_origin say nothing with attention 'full': leave them out or set attention to "
                f"'block_causal', got block_size {size!r} and block_origin {self.block_origin!r}"
            )
        if self.causal_context and not self.has_blocks:
            raise UserError("causal_context true says nothing with attention 'full': leave it out")


CoDAConfig.register_for_auto_class()
if __name__ == "CoDALanguageModel.configuration_coda":  # a copy that travels with weights is registered by transformers
    AutoConfig.register(CoDAConfig.model_type, CoDAConfig)
