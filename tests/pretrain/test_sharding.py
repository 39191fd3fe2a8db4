from pathlib import Path

import numpy as np
import pytest
import yaml

from coda_pretrain.devices.config import DcnMeshConfig, HardwareConfig, MeshConfig
from coda_pretrain.devices.sharding import (
    DEFAULT_RULES,
    activation_specs,
    partition_specs,
    rows_of_devices,
)
from CoDALanguageModel import CoDAConfig, CoDALanguageModel

TABLES = {
    path.name: yaml.safe_load(path.read_text())["hardware"]
    for path in sorted((Path(__file__).resolve().parents[2] / "pre-train/configs/sharding").glob("*.yaml"))
}
BACKBONES = {
    "Qwen3": {},
    "Qwen3, tied": {"tie_word_embeddings": True},
    "Qwen2": {"attention_bias": True, "qk_norm": False},
    "Llama": {"qk_norm": False},
    "Llama with biases": {"qk_norm": False, "attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
}


def network(**options):
    fields = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    ids = {"mask_token_id": 3, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2}
    return CoDALanguageModel(CoDAConfig(**fields, **heads, **ids, **options))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", TABLES)
def test_every_table_covers_every_weight_and_activation_of_every_backbone(backbone, name):
    model = network(**BACKBONES[backbone])
    shapes = [(weight, parameter.dim()) for weight, parameter in model.named_parameters()]
    specs = partition_specs(shapes, TABLES[name]["sharding_rules"])
    assert all(len(specs[weight]) == dims for weight, dims in shapes)
    axes = {"tensor", "fsdp"} if "tensor" in name else {"fsdp", None}
    assert all(set(specs[weight]) == axes for weight, dims in shapes if dims == 2)
    activations = activation_specs(dict(model.named_modules()), TABLES[name]["activation_rules"])
    assert {spec[0] for spec in activations.values()} == {("data", "fsdp")}
    assert {"model.embed_tokens", "model.norm", "model.layers.1.mlp.down_proj"} <= activations.keys()


def test_the_table_with_a_tensor_axis_is_the_built_in_one():
    assert {k: tuple(v) for k, v in TABLES["fsdp_tensor.yaml"]["sharding_rules"].items()} == DEFAULT_RULES


def test_a_weight_without_a_rule_is_named():
    with pytest.raises(ValueError, match=r"no pattern for the weight model\.norm\.weight; every weight needs one"):
        partition_specs([("model.norm.weight", 1)], {"*.bias": [None]})


def test_wrong_rules_are_refused():
    with pytest.raises(ValueError, match="must name data, fsdp, tensor or null, got 'fdsp'"):
        partition_specs([], {"*": ["fdsp"]})
    with pytest.raises(ValueError, match=r"must name 2 axes for lm_head\.weight, got \['fsdp'\]"):
        partition_specs([("lm_head.weight", 2)], {"*": ["fsdp"]})
    with pytest.raises(ValueError, match=r"activation_rules\['\*'\] must name data, fsdp, tensor or null, got 'fdsp'"):
        activation_specs(["lm_head"], {"*": [["data", "fdsp"]]})
    with pytest.raises(ValueError, match=r"activation_rules\['model.layer.\*'\] covers no module"):
        activation_specs(["model.layers.0"], {"model.layer.*": [None]})


def rows_of_hosts(shape, devices_per_host, num_rows):
    mesh = np.arange(np.prod(shape)).reshape(shape)
    hosts = mesh.size // devices_per_host
    share = [range(host * devices_per_host, (host + 1) * devices_per_host) for host in range(hosts)]
    return [rows_of_devices(num_rows, mesh, devices) for devices in share]


def test_hosts_of_a_one_dimensional_mesh_feed_the_rows_of_their_devices():
    assert rows_of_hosts((1, 8, 1), 4, 16) == [list(range(8)), list(range(8, 16))]
    assert rows_of_hosts((2, 4, 1), 2, 8) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_hosts_that_share_a_tensor_group_feed_the_same_rows():
    assert rows_of_hosts((1, 4, 2), 4, 8) == [[0, 1, 2, 3], [4, 5, 6, 7]]  # groups within hosts
    assert rows_of_hosts((1, 2, 4), 2, 4) == [[0, 1], [0, 1], [2, 3], [2, 3]]  # groups over two hosts
    assert rows_of_hosts((1, 1, 4), 2, 3) == [[0, 1, 2]] * 2


def test_devices_that_are_no_neighbours_in_the_mesh_feed_rows_apart():
    mesh = np.array([[[0, 1], [4, 5]], [[2, 3], [6, 7]]])  # (data, fsdp, tensor) as a torus may order them
    assert rows_of_devices(8, mesh, [0, 1, 2, 3]) == [0, 1, 4, 5]
    assert rows_of_devices(8, mesh, [4, 5, 6, 7]) == [2, 3, 6, 7]


def test_slices_lie_along_data():
    hardware = HardwareConfig(backend="xla", mesh=MeshConfig(data=2, fsdp=-1, tensor=2), dcn_mesh=DcnMeshConfig(data=2))
    assert hardware.global_mesh_shape(32) == (4, 4, 2)
    with pytest.raises(ValueError, match=r"hardware.dcn_mesh.data must divide the 7 devices of the run, got 2"):
        hardware.global_mesh_shape(7)
