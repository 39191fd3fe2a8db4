import pytest

from coda_pretrain.backends.sharding import partition_specs
from CoDALanguageModel import CoDAConfig, CoDALanguageModel


def shapes_of(**options):
    fields = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    ids = {"mask_token_id": 3, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2}
    model = CoDALanguageModel(CoDAConfig(**fields, **heads, **ids, **options))
    return [(name, parameter.dim()) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "qk_norm": False},
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    ],
)
def test_the_built_in_table_covers_every_weight_of_every_backbone(options):
    shapes = shapes_of(**options)
    specs = partition_specs(shapes)
    assert all(len(specs[name]) == dims for name, dims in shapes)
    matrices = [specs[name] for name, dims in shapes if dims == 2]
    assert all(set(spec) == {"tensor", "fsdp"} for spec in matrices)


def test_a_weight_without_a_rule_is_named():
    with pytest.raises(ValueError, match=r"no pattern for the weight model\.norm\.weight; every weight needs one"):
        partition_specs([("model.norm.weight", 1)], {"*.bias": [None]})


def test_wrong_rules_are_refused():
    with pytest.raises(ValueError, match="must name data, fsdp, tensor or null, got 'fdsp'"):
        partition_specs([], {"*": ["fdsp"]})
    with pytest.raises(ValueError, match=r"must name 2 axes for lm_head\.weight, got \['fsdp'\]"):
        partition_specs([("lm_head.weight", 2)], {"*": ["fsdp"]})
