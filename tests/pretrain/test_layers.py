"""How a layer's graph is split: what the backward pass is given, and where that waits."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("torch_xla")

from torch._functorch.aot_autograd import aot_export_joint_simple

from coda_pretrain.devices import layers
from coda_pretrain.devices.kernels import register_segment_attention
from coda_pretrain.devices.layers import LayerScan, keep_inputs_on_host, keep_only_inputs
from CoDALanguageModel import CoDAConfig, CoDALanguageModel
from CoDALanguageModel.attention_coda import block_causal, causal, doubled, full, widening
from CoDALanguageModel.modeling_coda import LAYER_LOOPS


def layer(hidden, weight):
    return ((hidden @ weight).sin() @ weight).relu()


def split(partition):
    inputs = [torch.randn(2, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)]
    joint = aot_export_joint_simple(lambda *args: (layer(*args),), inputs, trace_joint=True)
    return partition(joint, inputs, num_fwd_outputs=1)


def kept_by(forward):
    return forward.graph.output_node().args[0][1:]


def test_rematerialisation_keeps_the_inputs_of_a_layer_and_nothing_else():
    forward, _ = split(keep_only_inputs)
    assert {node.op for node in kept_by(forward)} == {"placeholder"}


def test_offloading_moves_the_hidden_states_to_the_host_and_back_and_no_weight():
    forward, backward = split(keep_inputs_on_host)
    to_host = torch.ops.xla.place_to_host.default
    hidden, weight = (node for node in forward.graph.nodes if node.op == "placeholder")
    kept = kept_by(forward)
    assert [node.args[0] for node in kept if node.target is to_host] == [hidden]
    assert weight in kept
    assert hidden not in kept
    returned = [node for node in backward.graph.nodes if node.target is torch.ops.xla.place_to_device.default]
    assert len(returned) == 1
    assert list(returned[0].args[0].users) == returned  # nothing reads it before it is on the device


def loop(run_one, carry, weights):
    """What a scan computes, without a device that compiles it."""
    for row in range(2):
        carry, _ = run_one(carry, {name: stacked[row] for name, stacked in weights.items()})
    return carry, None


@torch.no_grad()
def test_the_segment_kernel_and_the_scan_evaluate_every_rule(monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 72}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    special = {"mask_token_id": 67, "pad_token_id": 66, "bos_token_id": 64, "eos_token_id": 65}
    torch.manual_seed(0)
    model = CoDALanguageModel(CoDAConfig(**sizes, **heads, **special)).eval()
    ids, segments = torch.randint(64, (2, 12)), torch.tensor([[1] * 5 + [2] * 6 + [0], [1] * 12])
    places, positions = torch.arange(12).expand(2, -1), torch.tensor([[*range(5), *range(6), 0], [*range(12)]])
    rules = (
        full(segments),
        causal(segments),
        widening(segments, torch.tensor([2, 5])),
        block_causal(segments, places % 6 // 2, places >= 6),
        doubled(segments[:, :6], places[:, :6], places[:, :6] // 2 * 2, causal_context=True),
    )
    monkeypatch.setattr(layers, "Scan", SimpleNamespace(apply=loop))
    monkeypatch.setattr(LayerScan, "_trace", lambda self, carry, weights: (self._run_one,))
    for rule in rules:
        arguments = {"position_ids": positions, "visibility": rule}
        model.config._attn_implementation = "sdpa"
        want = model(ids, attention_mask=rule.mask(), position_ids=positions).logits
        model.config._attn_implementation = register_segment_attention()
        assert (model(ids, **arguments).logits - want).abs().max() < 1e-5
        with monkeypatch.context() as scanned:
            scanned.setitem(LAYER_LOOPS, "scan", LayerScan(model.model, partition=None))
            scanned.setattr(model.model, "layer_loop", "scan")
            assert (model(ids, **arguments).logits - want).abs().max() < 1e-5
