"""How a layer's graph is split: what the backward pass is given, and where that waits."""

import pytest
import torch

pytest.importorskip("torch_xla")

from torch._functorch.aot_autograd import aot_export_joint_simple

from coda_pretrain.devices.layers import keep_inputs_on_host, keep_only_inputs


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
