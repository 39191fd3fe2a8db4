"""The CoDA network: a transformer on Qwen3's parts without the causal mask, one class for CPU, GPU and TPU.

The forward pass draws no noise and knows no device. Not here: who may attend to whom (`attention_coda`), the forward
process and the loss (`diffusion`), checkpoints (`loading_coda`), the decoding loop (`decoder`).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.utils import ModelOutput

from .attention_coda import Visibility, attention_kernel, layer_mask, places, rule_of
from .configuration_coda import CoDAConfig
from .diffusion import IGNORE_INDEX, chunked_cross_entropy, scored_by
from .generation_coda import DiffusionGenerationMixin
from .generation_config_coda import DiffusionGenerationConfig
from .loading_coda import EMBEDDING_WEIGHT, HEAD_WEIGHT, StrictLoading

# transformers copies the files that this one imports into a saved folder, so every file of the model is named here.
from .blocks import BlockScorer as BlockScorer  # isort: skip
from .cache import CanvasCache as CanvasCache  # isort: skip
from .candidates import Candidates as Candidates  # isort: skip
from .canvas import Canvas as Canvas  # isort: skip
from .config_fields import check_fields as check_fields  # isort: skip
from .constraints import Constraint as Constraint  # isort: skip
from .cost import DecodingCost as DecodingCost  # isort: skip
from .decoder import Decoding as Decoding  # isort: skip
from .decoding_settings import Setting as Setting  # isort: skip
from .errors import UserError as UserError  # isort: skip
from .infilling import InfillOutput as InfillOutput  # isort: skip
from .json_schema import of_schema as of_schema  # isort: skip
from .limits import Limits as Limits  # isort: skip
from .orders import Order as Order  # isort: skip
from .regular import Automaton as Automaton  # isort: skip
from .row import Row as Row  # isort: skip
from .run_files import read_json as read_json  # isort: skip
from .schedule import Commit as Commit  # isort: skip
from .scoring import Scorer as Scorer  # isort: skip
from .speculation import Speculation as Speculation  # isort: skip
from .stepwise import Stepwise as Stepwise  # isort: skip
from .streamers import Feed as Feed  # isort: skip
from .vocabulary import Vocabulary as Vocabulary  # isort: skip
from .weight_files import check_weights as check_weights  # isort: skip


@dataclass
class CoDAOutput(ModelOutput):
    """What `CoDALanguageModel.forward` returns.

    Attributes:
        loss: 0-d float32, when labels were given.
        logits: raw logits (row i scores token i + 1), (B, T, V) or the rows asked for; None when labels were given.
        past_key_values: the cache that was passed in.
        hidden_states: embeddings and the output of each layer, the last one normalised, (B, T, hidden_size) each, when
            asked for.
        attentions: weights of each layer, (B, H, T, T) each, when asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class CoDAAttention(Qwen3Attention):
    """Qwen3's attention without the causal mask, with optional q/k norm and output bias."""

    def __init__(self, config: CoDAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = False
        if config.attention_output_bias != config.attention_bias:  # Qwen3 has one switch for all four projections
            self.o_proj = nn.Linear(
                config.num_attention_heads * self.head_dim, config.hidden_size, bias=config.attention_output_bias
            )
        if not config.qk_norm:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kernel_arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the values of the positions that each one may attend to.

        Args:
            hidden_states: (B, T, hidden_size).
            position_embeddings: cosines and sines of the rotary embedding, (B, T, D) each.
            attention_mask: see `attention_coda.layer_mask`.
            past_key_values: see `CoDALanguageModel.forward`.
            **kernel_arguments: see `attention_coda.layer_mask`.

        Returns:
            (B, T, hidden_size), and the attention weights where the kernel gives them.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)  # (B, H, T, D)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)  # (B, H_kv, T, D)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        if name == "flex_attention" and isinstance(attention_mask, Tensor):
            name = "sdpa"  # see `layer_mask`
        if name.startswith(("flex", "flash")):
            # Under autocast the norms and the rotation give float32. The other kernels cast for themselves, after key
            # heads are repeated, so that the gradients of a group's heads are summed in float32.
            query, key = query.to(value.dtype), key.to(value.dtype)
        mixed, weights = attention_kernel(name)(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kernel_arguments,
        )
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1)), weights


class CoDAMLP(Qwen3MLP):
    """Qwen3's gated MLP with optional biases."""

    def __init__(self, config: CoDAConfig):
        super().__init__(config)
        if config.mlp_bias:
            self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size)
            self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size)
            self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size)


class CoDALayer(Qwen3DecoderLayer):
    """One transformer layer: (B, T, hidden_size) -> (B, T, hidden_size)."""

    def __init__(self, config: CoDAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = CoDAAttention(config, layer_idx)
        self.mlp = CoDAMLP(config)


class CoDAPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the network; see `CoDALanguageModel` for its use."""

    config_class = CoDAConfig
    config: CoDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["CoDALayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class CoDAModel(CoDAPreTrainedModel):
    """The network without its head: token ids to hidden states."""

    layer_loop = "loop"

    def __init__(self, config: CoDAConfig):
        super().__init__(config)
        # No padding_idx: the pad token of the Qwen family also ends documents, so its row must be trained.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(CoDALayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        visibility: Visibility | None = None,
    ) -> BaseModelOutputWithPast | tuple:
        """Give the normalised hidden states of the last layer, and those of all layers when asked for.

        See `CoDALanguageModel.forward` for the arguments.
        """
        if use_cache and past_key_values is None:
            raise ValueError(
                "use_cache=True needs a cache in past_key_values: a bidirectional model has no default one"
            )
        output_attentions = _asked(output_attentions, self.config.output_attentions)
        output_hidden_states = _asked(output_hidden_states, self.config.output_hidden_states)
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                "output_attentions=True needs attn_implementation 'eager', the kernel that gives weights, got "
                f"{self.config._attn_implementation!r}"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is not None and attention_mask.ndim not in (2, 4):
            raise ValueError(
                f"attention_mask must be (B, T) or (B, 1, T, T), got the shape {tuple(attention_mask.shape)}"
            )
        if position_ids is None:
            position_ids = default_position_ids(hidden, attention_mask, segment_ids)
        if self.config.has_blocks and visibility is None and (attention_mask is None or attention_mask.ndim == 2):
            if past_key_values is not None:
                raise ValueError(
                    "attention by blocks through a cache needs a (B, 1, T, T) attention_mask over the cached keys"
                )
            segment_ids = torch.ones_like(hidden[..., 0], dtype=torch.long) if segment_ids is None else segment_ids
            visibility = rule_of(self.config, segment_ids, position_ids)
        mask, kernel_arguments = layer_mask(self.config, hidden, attention_mask, segment_ids, visibility)
        with _attention_weights(self.layers if output_attentions else ()) as attentions:
            hidden, all_hidden = LAYER_LOOPS[self.layer_loop](
                self,
                hidden,
                position_ids,
                past_key_values=past_key_values,
                output_hidden_states=output_hidden_states,
                attention_mask=mask,
                **kernel_arguments,
            )
        hidden = self.norm(hidden)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=None if all_hidden is None else (*all_hidden[:-1], hidden),
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if _asked(return_dict, self.config.return_dict) else output.to_tuple()


def _asked(argument: bool | None, setting: bool) -> bool:
    """What a call says, else what the configuration does."""
    return setting if argument is None else argument


@contextmanager
def _attention_weights(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that gets the attention weights of each layer that runs meanwhile, (B, H, T, T)."""
    weights: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, inputs, outputs: weights.append(outputs[1]))
        for layer in layers
    ]
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


def loop_layers(
    model: CoDAModel,
    hidden: Tensor,
    position_ids: Tensor,
    *,
    past_key_values: Cache | None = None,
    output_hidden_states: bool = False,
    **layer_arguments: Any,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Run the layers one after another.

    Args:
        model: whose layers.
        hidden: (B, T, hidden_size) embeddings.
        position_ids: (B, T) or (1, T) int64.
        past_key_values: see `CoDALanguageModel.forward`.
        output_hidden_states: also give the hidden states before the first layer and after each.
        **layer_arguments: mask and kernel arguments, as `layer_mask` gives them.

    Returns:
        The output of the last layer, before the norm, and all hidden states when asked for.
    """
    position_embeddings = model.rotary_emb(hidden, position_ids)
    all_hidden = [hidden] if output_hidden_states else None
    for layer in model.layers:
        hidden = layer(
            hidden, position_embeddings=position_embeddings, past_key_values=past_key_values, **layer_arguments
        )
        if all_hidden is not None:
            all_hidden.append(hidden)
    return hidden, tuple(all_hidden) if all_hidden is not None else None


LAYER_LOOPS: dict[str, Callable[..., tuple[Tensor, tuple[Tensor, ...] | None]]] = {"loop": loop_layers}
"""Ways to run the layers, by the name that a `CoDAModel` holds in `layer_loop`. A trainer adds its own here, which give
the same numbers."""


def default_position_ids(hidden: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    """Count real tokens from the start of the row, or of the segment; (B, T) or (1, T) int64.

    Padding therefore moves no position, on whichever side it is.
    """
    index = torch.arange(hidden.shape[1], device=hidden.device)[None]  # (1, T)
    if segment_ids is not None:
        return places(segment_ids)
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return index


class CoDAHead(nn.Linear):
    """The language-model head, which can also compute the loss of its logits.

    Loss and head are one call: a sharded model (ZeRO-3, FSDP) gathers the weights of a module once for each of its
    calls and once for each backward pass, and all processes must do so equally often, whatever the number of labels.
    """

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, weights: Tensor | None = None, *, z_loss: float = 0.0
    ) -> Tensor:
        """Give the logits, (..., hidden_size) -> (..., vocab_size); with labels what `chunked_cross_entropy` gives."""
        if labels is None:
            return super().forward(hidden)
        return chunked_cross_entropy(hidden, labels, weights, super().forward, self.out_features, z_loss=z_loss)


class CoDALanguageModel(StrictLoading, CoDAPreTrainedModel, DiffusionGenerationMixin):
    """Masked-diffusion language model; `from_pretrained` loads, `diffusion_generate` decodes."""

    _tied_weights_keys = {HEAD_WEIGHT: EMBEDDING_WEIGHT}
    loss_sum = "chunked"
    z_loss = 0.0
    """See `diffusion.chunked_cross_entropy`; a trainer sets it."""

    def __init__(self, config: CoDAConfig):
        super().__init__(config)
        self.model = CoDAModel(config)
        self.lm_head = CoDAHead(config.hidden_size, config.vocab_size, bias=False)
        self.generation_config = DiffusionGenerationConfig()
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        visibility: Visibility | None = None,
        doubled: bool = False,
    ) -> CoDAOutput | tuple:
        """Score every token of a canvas from all the others, or compute the loss of the masked ones.

        Args:
            input_ids: (B, T) int64, tokens with `mask_token_id` where unknown.
            attention_mask: (B, T) with 1 at real positions and 0 at padding on any side; or (B, 1, T, T), True
                where the query (third axis) may attend to the key.
            position_ids: (B, T) int64; by default the count of real tokens before each position, from the start of
                the row or of the segment.
            segment_ids: (B, T) int, 0 at padding and 1, 2, ... for packed documents that do not see each other.
            past_key_values: a cache whose `update` decides which keys and values the layers see.
            inputs_embeds: (B, T, hidden_size) instead of `input_ids`.
            positions: rows to compute logits for: (B, P) int64 columns -> (B, P, V), (N,) int64 indices into the
                flattened (B * T) rows -> (N, V), or (B, T) bool -> (N, V) in row-major order.
            labels: (B, T) int64, the clean token at masked positions and -100 elsewhere. Position 0 of a row, of a
                segment, and the first position after padding have no predecessor and are never scored.
            loss_weights: (B,) or (B, T) float; the loss is `sum_i loss_weights_i * CE_i`, so that 1/t and the
                denominator are the caller's. Without it the loss is the plain mean over the scored positions.
            output_attentions: also return the attention weights of all layers; with attn_implementation `eager`
                alone. None is what the configuration says, as for the two like it below.
            output_hidden_states: also return the hidden states of all layers.
            use_cache: accepted for callers that always pass it; caches are passed as `past_key_values`.
            return_dict: False gives a tuple of the fields that are set.
            visibility: who may attend to whom, other than as the configuration says for texts from their start: a rule
                of `attention_coda`, which holds the segments too.
            doubled: whether rows are `[noisy; clean]`, each text twice, as `noise.noise_blocks` makes them; needs
                `position_ids` and `visibility`. Labels and their weights are then those of the noisy half,
                (B, T / 2), or (B, T) where the clean half is scored too.

        Returns:
            `CoDAOutput`. With labels its logits are None: the head runs in chunks on the scored rows only.

        Raises:
            ValueError: contradictory arguments or shapes that do not fit.
        """
        if labels is not None and positions is not None:
            raise ValueError("labels and positions exclude each other: with labels the logits are not returned")
        if loss_weights is not None and labels is None:
            raise ValueError("loss_weights need labels")
        if doubled and (position_ids is None or visibility is None or attention_mask is not None):
            raise ValueError("doubled rows need position_ids and visibility, and tell padding by segments alone")
        if visibility is not None and segment_ids is None:
            segment_ids = visibility.segment
        seen = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            use_cache=use_cache,
            return_dict=True,
            visibility=visibility,
        )
        hidden = seen.last_hidden_state
        loss = logits = None
        if labels is not None:
            group = visibility.group if doubled else None
            loss = self._loss(hidden, labels, loss_weights, attention_mask, segment_ids, group)
        elif positions is None:
            logits = self.lm_head(self._scoring(hidden, attention_mask, segment_ids))
        else:
            logits = self.lm_head(_select_rows(hidden, positions))
        output = CoDAOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=seen.hidden_states,
            attentions=seen.attentions,
        )
        return output if _asked(return_dict, self.config.return_dict) else output.to_tuple()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Transformers' own; the ids below `new_num_tokens` may then come out, and rows that pad beyond them not."""
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens is not None:
            self.config.num_token_ids = self.generation_config.num_token_ids = new_num_tokens
        return embedding

    def _scoring(self, hidden: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None) -> Tensor:
        """The rows whose logits a caller gets that asks for all, (B, T, hidden_size): those of the network itself."""
        return hidden

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        loss_weights: Tensor | None,
        attention_mask: Tensor | None,
        segment_ids: Tensor | None,
        doubled_group: Tensor | None,
    ) -> Tensor:
        """Chunked cross-entropy of the labelled positions, each scored by the row that `scored_by` names."""
        num_rows, length = hidden.shape[:2]
        shapes = [(num_rows, length)] if doubled_group is None else [(num_rows, length // 2), (num_rows, length)]
        if labels.shape not in shapes:
            raise ValueError(f"labels must have shape {' or '.join(map(str, shapes))}, got {tuple(labels.shape)}")
        if loss_weights is not None and loss_weights.ndim == 1:
            loss_weights = loss_weights[:, None].expand(labels.shape)
        if loss_weights is not None and loss_weights.shape != labels.shape:
            raise ValueError(
                f"loss_weights must be (B,) or (B, T) = {tuple(labels.shape)}, got {tuple(loss_weights.shape)}"
            )
        if doubled_group is not None:
            row = scored_by(None, segment_ids, shift=self.config.logits_shift, doubled_group=doubled_group)
            row = row[:, : labels.shape[1]]
            labels = labels.masked_fill(row < 0, IGNORE_INDEX)
            if self.config.logits_shift:
                # A neighbour in the same half or in the clean one: views between which is chosen, with static shapes.
                half = length // 2
                from_clean = (row[:, 1:half] >= half)[..., None]
                scoring = torch.where(from_clean, hidden[:, half:-1], hidden[:, : half - 1])
                if labels.shape[1] > half:
                    scoring = torch.cat([scoring, hidden[:, half - 1 : -1]], dim=1)
                hidden, labels = scoring, labels[:, 1:]
                loss_weights = None if loss_weights is None else loss_weights[:, 1:]
            else:
                hidden = hidden[:, : labels.shape[1]]
        elif self.config.logits_shift:
            padding = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
            if padding is None and segment_ids is None:
                segment_ids = torch.ones_like(labels)
            # Rows are moved by one place, as a view. What stands behind padding inside a row is therefore not scored.
            by_neighbour = scored_by(padding, segment_ids)[:, 1:] == torch.arange(
                labels.shape[1] - 1, device=labels.device
            )
            hidden, labels = hidden[:, :-1], labels[:, 1:].masked_fill(~by_neighbour, IGNORE_INDEX)
            loss_weights = None if loss_weights is None else loss_weights[:, 1:]
        scored = labels != IGNORE_INDEX
        if loss_weights is None:
            loss_weights = scored / scored.sum().clamp(min=1)
        weights = torch.where(scored, loss_weights.float(), 0.0)
        return LOSSES[self.loss_sum](self, hidden, labels, weights)


class CoDAForMaskedLM(CoDALanguageModel):
    """The same model for callers of `AutoModelForMaskedLM`, for whom row i of the logits scores token i.

    Logits are 0 where nothing scores a position: at the first one of a row or segment, and at padding. Rows that are
    asked for by `positions` are the network's own, as in `CoDALanguageModel`.
    """

    def _scoring(self, hidden: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None) -> Tensor:
        padding = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        if padding is None and segment_ids is None:
            padding = torch.ones_like(hidden[..., 0], dtype=torch.long)
        row = scored_by(padding, segment_ids, shift=self.config.logits_shift)[:, :, None]
        return hidden.gather(1, row.clamp(min=0).expand_as(hidden)) * (row >= 0)


def head_cross_entropy(model: CoDALanguageModel, hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Apply the head and sum the cross-entropies; see `chunked_cross_entropy` for arguments and result."""
    head = model.lm_head
    if isinstance(head, CoDAHead) or isinstance(getattr(head, "module", None), CoDAHead):  # the second is FSDP's
        return head(hidden, labels, weights, z_loss=model.z_loss)
    return chunked_cross_entropy(  # e.g. LoRA on the head
        hidden, labels, weights, head, model.config.vocab_size, z_loss=model.z_loss
    )


LOSSES: dict[str, Callable[..., Tensor]] = {"chunked": head_cross_entropy}
"""Ways to sum the cross-entropies, by the name that a `CoDALanguageModel` holds in `loss_sum`. A trainer adds its own
here, which give the same number."""


def _select_rows(hidden: Tensor, positions: Tensor) -> Tensor:
    """Rows of (B, T, hidden_size) by column indices (B, P), flat indices (N,) or a (B, T) bool mask."""
    if positions.dtype == torch.bool:
        return hidden[positions]
    if positions.ndim == 1:
        return hidden.flatten(0, 1).index_select(0, positions)
    if positions.ndim == 2 and len(positions) == len(hidden):
        return hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[-1]))
    raise ValueError(f"positions must be (B, P), (N,) or a (B, T) bool mask, got the shape {tuple(positions.shape)}")


CoDALanguageModel.register_for_auto_class("AutoModelForCausalLM")
CoDAForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
if __name__ == "CoDALanguageModel.modeling_coda":  # a copy that travels with weights is registered by transformers
    AutoModel.register(CoDAConfig, CoDALanguageModel)
    AutoModelForCausalLM.register(CoDAConfig, CoDALanguageModel)
    AutoModelForMaskedLM.register(CoDAConfig, CoDAForMaskedLM)
