"""The layers of a model as one loop on the device: a layer is compiled once, and what it keeps is chosen here.

`LayerScan` is a way to run the layers of a `CoDAModel`. A partition function splits a layer's traced forward and
backward graph: without rematerialisation it keeps what the backward pass reads, with it only the layer's input, which
can wait in the host's memory.
"""

import copy
import gc
import operator
from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import default_partition, min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy
from torch_xla.experimental.scan import Scan, value_and_grad_partitioned

from CoDALanguageModel.attention_coda import Visibility, full
from CoDALanguageModel.errors import UserError

PartitionFunction = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]


def keep_only_inputs(joint: fx.GraphModule, inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a traced layer so that its backward pass computes everything again from the layer's inputs."""
    for node in joint.graph.nodes:
        # Results that are tuples are taken apart by getitem nodes, which carry no computation of their own.
        if node.op == "call_function" and node.target is not operator.getitem and "recompute" not in node.meta:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = 0
    return min_cut_rematerialization_partition(joint, inputs, **options)


def keep_inputs_on_host(joint: fx.GraphModule, inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """As `keep_only_inputs`, with the hidden states (the first input) in the host's memory until they are needed."""
    forward, backward = keep_only_inputs(joint, inputs, **options)
    name = next(node.name for node in joint.graph.nodes if node.op == "placeholder")
    output = forward.graph.output_node()
    results = list(output.args[0])
    kept = [i for i in range(options["num_fwd_outputs"], len(results)) if results[i].name == name]
    assert len(kept) == 1, f"the layer's input {name} is kept exactly once, found at {kept}"
    with forward.graph.inserting_before(output):
        results[kept[0]] = forward.graph.call_function(torch.ops.xla.place_to_host.default, (results[kept[0]],))
    output.args = (tuple(results),)
    placeholder = next(node for node in backward.graph.nodes if node.op == "placeholder" and node.name == name)
    first = next(node for node in backward.graph.nodes if node.op != "placeholder")
    with backward.graph.inserting_before(first):
        on_device = backward.graph.call_function(torch.ops.xla.place_to_device.default, (placeholder,))
    placeholder.replace_all_uses_with(on_device, delete_user_cb=lambda user: user is not on_device)
    for graph in (forward, backward):
        graph.graph.lint()
        graph.recompile()
    return forward, backward


def partition_function(*, remat: bool, offload: bool) -> PartitionFunction:
    """How a layer's graph is split, as `hardware.remat` and `hardware.offload` ask."""
    if offload:
        return keep_inputs_on_host
    return keep_only_inputs if remat else default_partition


class LayerScan:
    """What `loop_layers` is, on XLA: all layers by one compiled one, over their stacked weights."""

    def __init__(self, model: nn.Module, *, partition: PartitionFunction) -> None:
        """Take the layers of `model`, a `CoDAModel` whose kernel takes a rule or segments.

        Raises:
            UserError: the layers drop out attention weights, so that no two of their runs are the same graph.
        """
        if model.config.attention_dropout:
            raise UserError(
                "hardware.layers 'scan' needs attention_dropout 0 in the model's configuration, "
                f"got {model.config.attention_dropout}; use hardware.layers 'loop'"
            )
        self._layers, self._rotary = list(model.layers), model.rotary_emb
        # Structure alone: the weights of each turn are given to it.
        self._layer = copy.deepcopy(self._layers[0]).to("meta")
        self._rotary_structure = copy.deepcopy(self._rotary).to("meta")
        self._partition = partition
        self._traced: dict[Any, tuple[Callable[..., Any], ...]] = {}

    def __call__(
        self,
        model: nn.Module,
        hidden: Tensor,
        position_ids: Tensor,
        *,
        past_key_values: None = None,
        output_hidden_states: bool = False,
        attention_mask: None = None,
        visibility: Visibility | None = None,
        segment_ids: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """See `loop_layers` of `CoDALanguageModel.modeling_coda`.

        Raises:
            UserError: hidden states of all layers, a cache or a mask are asked for.
        """
        assert model.rotary_emb is self._rotary, "a process scans the layers of one model"
        if past_key_values is not None or output_hidden_states or attention_mask is not None:
            raise UserError("hardware.layers 'scan' runs whole packed rows: no cache, no mask, no hidden states")
        # The carry goes through every layer and must be of floats. The rule and positions are small; masks and angles
        # are made of them inside, where they are not kept for the backward pass.
        if visibility is None:
            visibility = full(torch.ones_like(position_ids) if segment_ids is None else segment_ids)
        facts = (fact.float() for fact in visibility if fact is not None)
        carry = (hidden, position_ids.float(), self._rotary.inv_freq, *facts)
        names = [name for name, _ in self._layers[0].named_parameters()]
        rows = [dict(layer.named_parameters()) for layer in self._layers]
        weights = {name: torch.stack([row[name] for row in rows]) for name in names}
        carry, _ = Scan.apply(*self._trace(carry, weights), carry, weights)
        return carry[0], None

    def _trace(self, carry: tuple[Tensor, ...], weights: dict[str, Tensor]) -> tuple[Callable[..., Any], ...]:
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in carry) + (
            torch.is_autocast_enabled("xla"),
            torch.is_grad_enabled(),
        )
        if key not in self._traced:
            self._traced[key] = value_and_grad_partitioned(
                self._run_one, carry, weights, partition_fn=self._partition, is_fn_pure=False
            )
            gc.collect()  # tracing leaves tensors in cycles, which would be results of the first step's graph alone
        return self._traced[key]

    def _run_one(self, carry: tuple[Tensor, ...], weights: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], None]:
        hidden, positions, frequencies, *facts = carry
        angles = functional_call(self._rotary_structure, {"inv_freq": frequencies}, (hidden, positions))
        rule = {"visibility": Visibility(*facts), "segment_ids": facts[0]}  # a kernel takes the one or the other
        arguments = {"attention_mask": None, "position_embeddings": angles, **rule}
        hidden = functional_call(self._layer, weights, (hidden,), arguments)
        return (hidden, *carry[1:]), None
