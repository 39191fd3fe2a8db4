"""Files, overrides and what is refused."""

import pytest
import yaml

from coda_pretrain.config import RunConfig, load_config, read_settings
from coda_pretrain.devices.config import HardwareConfig, MeshConfig
from coda_pretrain.plain_data import from_dict, merge, to_plain, to_yaml


def test_later_files_and_overrides_win_key_by_key(tmp_path, run_config):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(run_config))
    (tmp_path / "b.yaml").write_text("optimizer: {learning_rate: 3e-4}\nhardware: {precision: bf16}\n")
    files = [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    config = load_config(files, ["hardware.mesh.fsdp=1", "schedule.name=cosine", "masking.span_lengths=[2, 4]"])
    assert config.optimizer.learning_rate == 3e-4
    assert (config.optimizer.name, config.optimizer.weight_decay) == ("adamw", 0.1)
    assert (config.hardware.precision, config.hardware.num_threads, config.hardware.mesh.fsdp) == ("bf16", 1, 1)
    assert config.masking.span_lengths == (2, 4)
    assert config.schedule.name == "cosine"


def test_the_resolved_configuration_reads_back_equal(run_config):
    config = from_dict(RunConfig, run_config)
    assert from_dict(RunConfig, yaml.safe_load(to_yaml(config))) == config
    assert to_plain(config)["data"]["sources"][0]["path"] == run_config["data"]["sources"][0]["path"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_step": 3}, "unknown key max_step; did you mean 'max_steps'"),
        ({"masking": {"prefix_prob": 0.2}}, "unknown key masking.prefix_prob; did you mean 'prefix_probability'"),
        ({"hardware": {"mesh": {"fdsp": 2}}}, "unknown key hardware.mesh.fdsp; did you mean 'fsdp'"),
        ({"optimizer": {"name": "adam"}}, "optimizer.name must be one of adafactor, adamw, got 'adam'"),
        ({"optimizer": {"learning_rate": "fast"}}, "optimizer.learning_rate must be a number, got 'fast'"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate must be > 0, got 0.0"),
        ({"optimizer": {"betas": [0.9]}}, r"optimizer.betas must have 2 entries, got \[0.9\]"),
        ({"max_steps": 0}, "max_steps must be >= 1, got 0"),
        ({"max_steps": True}, "max_steps must be int, got True"),
        ({"max_steps": "6"}, "max_steps must be int, got '6'"),
        ({"num_epochs": 2}, "exactly one of max_steps and num_epochs, got 6 and 2.0"),
        ({"global_batch_size": -1}, "global_batch_size must be >= 1, got -1"),
        ({"micro_batch_size": 3}, "micro_batch_size must divide global_batch_size 8, got 3"),
        ({"seq_len": 1}, "seq_len must be >= 2, got 1"),
        ({"schedule": {"warmup_steps": -1}}, "schedule.warmup_steps must be >= 0, got -1"),
        ({"checkpoint": {"keep": 0}}, "checkpoint.keep must be >= 1, got 0"),
        ({"evaluation": {"every": 5}}, "evaluation.data must name held-out shards"),
        ({"model": {"init_from": "x"}}, "exactly one of model.init_from"),
        ({"model": 3}, "model must be a mapping, got 3"),
        ({"hardware": {"compile": True, "backend": "xla"}}, "the xla backend always compiles"),
        ({"hardware": {"mesh": {"tensor": 2}}}, "hardware.mesh.tensor > 1 needs backend 'xla', got backend 'cpu'"),
        ({"hardware": {"layers": "scan"}}, "hardware.layers has no effect on backend 'cpu', only on 'xla'"),
        ({"hardware": {"dcn_mesh": {"data": 2}}}, "hardware.dcn_mesh has no effect on backend 'cpu'"),
        ({"hardware": {"backend": "xla", "offload": True}}, "hardware.offload needs hardware.layers 'scan'"),
        (
            {"model": {"attn_implementation": "splash"}},
            "must be one of sdpa, eager on hardware.backend 'cpu', got 'splash'",
        ),
        (
            {"model": {"attn_implementation": "splash"}, "hardware": {"backend": "cuda"}},
            "must be one of sdpa, eager, flash_attention_2, flex_attention on hardware.backend 'cuda', got 'splash'",
        ),
        (
            {"model": {"attn_implementation": "flex_attention"}, "hardware": {"backend": "cuda"}},
            "'flex_attention' needs hardware.compile true, got false",
        ),
        (
            {"model": {"attn_implementation": "flash_attention_2"}, "hardware": {"backend": "cuda"}},
            "'flash_attention_2' needs hardware.precision bf16, got fp32",
        ),
        (
            {"model": {"attn_implementation": "flex_attention"}, "hardware": {"backend": "xla"}},
            "must be one of sdpa, eager, splash on hardware.backend 'xla', got 'flex_attention'",
        ),
        ({"optimizer": {"ema_decay": 1.0}}, "optimizer.ema_decay must be > 0 and < 1, got 1.0"),
        ({"hardware": {"sharding_rules": {"*": ["fsdp"]}}}, "hardware.sharding_rules has no effect on backend 'cpu'"),
        ({"hardware": {"compilation_cache": "c"}}, "hardware.compilation_cache has no effect on backend 'cpu'"),
        ({"hardware": {"backend": "xla", "splash_block": 200}}, "splash_block must be a multiple of 128, at least 128"),
        ({"hardware": {"backend": "xla", "libtpu_args": ["--a=1 --b"]}}, "must be flags like --name=value, got '--a=1"),
        ({"hardware": {"mesh": {"data": -1}}}, "at most one -1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(run_config, change, message):
    with pytest.raises(ValueError, match=message):
        from_dict(RunConfig, merge(run_config, change))


@pytest.mark.parametrize("key", ["output_dir", "global_batch_size", "seq_len", "model", "data", "optimizer"])
def test_settings_without_a_default_are_demanded(run_config, key):
    del run_config[key]
    with pytest.raises(ValueError, match=f"missing key {key}: it has no default"):
        from_dict(RunConfig, run_config)


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        (None, [], r"gone\.yaml: no such file"),
        ("- 1", [], "must hold a mapping"),
        ("a: [", [], "is not YAML"),
        ("seed: 1", ["seed"], "an override must look like key=value, got 'seed'"),
    ],
)
def test_unreadable_files_and_overrides_are_named(tmp_path, content, overrides, message):
    path = tmp_path / "gone.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_config([str(path)], overrides)


@pytest.mark.parametrize("name", ["40000", "runs/a #b", "a: b", "[a", "no", "2024-01-01", "'a #b'"])
def test_a_folder_of_any_name_is_taken_as_it_is(name):
    values = read_settings([], [f"output_dir={name}", f"model.init_from={name}", f"data.root={name}", "max_steps=3"])
    name = name.strip("'")
    assert values == {"output_dir": name, "model": {"init_from": name}, "data": {"root": name}, "max_steps": 3}
    assert read_settings([], ["model.init_from=null"]) == {"model": {"init_from": None}}
    with pytest.raises(ValueError, match=r"max_steps=\[3 is not YAML"):
        read_settings([], ["max_steps=[3"])


def test_the_mesh_takes_what_is_left_of_the_devices():
    assert MeshConfig(data=2, tensor=2).shape(16) == (2, 4, 2)
    assert MeshConfig().shape(1) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"\(3, 1, 1\) needs 3 devices, this run has 4"):
        MeshConfig(data=3).shape(4)


def test_flags_of_the_chip_reach_libtpu_unless_settings_or_environment_have_them():
    v6e = HardwareConfig(backend="xla", chip="v6e")
    assert v6e.longest_splash_block() == 2048
    assert "--xla_tpu_scoped_vmem_limit_kib=98304" in v6e.libtpu_init_args("").split()
    words = v6e.libtpu_init_args("--xla_tpu_scoped_vmem_limit_kib=1 --other").split()
    assert words[:2] == ["--xla_tpu_scoped_vmem_limit_kib=1", "--other"]
    assert sum(word.startswith("--xla_tpu_scoped_vmem_limit_kib") for word in words) == 1
    assert HardwareConfig(backend="xla", chip="v6e", libtpu_args=["--a=1"]).libtpu_init_args("--b") == "--b --a=1"
    assert HardwareConfig(backend="xla", splash_block=256).longest_splash_block() == 256
    assert HardwareConfig().libtpu_init_args("") == ""
