"""`plan --compile-only`."""

import json

import yaml

from coda_pretrain.__main__ import main
from coda_pretrain.plain_data import merge

MESH = {"data": 1, "fsdp": 2, "tensor": 2}


def test_the_step_is_compiled_for_the_mesh_and_its_weights_are_counted(tmp_path, run_config, capsys):
    changes = {
        "model": {"config": {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 2048}},
        "hardware": {"backend": "xla", "chip": "v5e", "layers": "scan", "remat": True, "mesh": MESH},
        "micro_batch_size": 4,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(merge(run_config, changes)))
    assert main(["plan", "--config", str(path), "--json", "--compile-only"]) == 0
    plan = json.loads(capsys.readouterr().out)
    parts, update = plan["compiled"]
    assert (parts["name"], update["name"]) == ("gradients of a part", "update")
    memory = plan["memory"]["remat"]
    state = sum(memory["optimizer"].values())
    # Weights and gradients go in; then also AdamW's state. The batch and small constants come on top.
    assert 0 < parts["arguments"] - memory["weights"] - memory["gradients"] < 0.2 * memory["weights"]
    assert 0 <= update["arguments"] - memory["weights"] - memory["gradients"] - state < 0.1 * memory["weights"]
    for graph in (parts, update):
        assert graph["total"] == graph["arguments"] + graph["temporary"] + graph["results"]
        assert min(graph["temporary"], graph["compile_s"]) > 0
        assert graph["largest"]


def test_other_backends_have_nothing_to_compile(tmp_path, run_config, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_config))
    assert main(["plan", "--config", str(path), "--device", "1xH100", "--compile-only"]) == 2
    assert "--compile-only needs hardware.backend xla, got 'cpu'" in capsys.readouterr().err
