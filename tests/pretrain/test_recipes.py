import json
import math
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from coda_pretrain.__main__ import main
from coda_pretrain.checkpoints.export import main as export_main
from coda_pretrain.config import RunConfig, load_config
from coda_pretrain.plain_data import from_dict
from coda_pretrain.train.trainer import Trainer
from coda_pretrain.watch.metrics import read_rows
from CoDALanguageModel import CoDALanguageModel

from .conftest import autoregressive_folder

SETTINGS = {
    "CODA_DATA_DIR": "/data dir",
    "CODA_OUTPUT_DIR": "/runs",
    "CODA_TOKENIZER_DIR": "/tokenizer",
    "CODA_BACKBONE_DIR": "/backbone",
    "CODA_PRETRAINED_DIR": "/pretrained",
}
STAGES = ("pretrain", "midtrain")
TABLE_3 = ((0.01, 0.01, 0.05), (0.05, 0.05, 0.10), (0.10, 0.10, 0.15), (0.15, 0.15, 0.20), (0.20, 0.20, 0.25))
ADAPTED = {"adapt_qwen25_coder_05b": "qwen2", "adapt_smollm2_135m": "llama"}
"""Recipes of an adaptation, and the kind of their backbone."""
DEVICES = {"v4_1024": 512, "v4_512": 256, "v5p_64": 32, "v5e_8": 8, "h100_8": 8}
TPUS = ("v4_1024", "v4_512", "v5p_64", "v5e_8")


def stage_config(repo, stage, hardware="cpu", *overrides):
    folder = repo / "pre-train" / "configs"
    files = [str(folder / f"{stage}.yaml"), str(folder / "hardware" / f"{hardware}.yaml")]
    needed = ["output_dir=/runs/x", "model.tokenizer=/t", "model.init_from=/m", *overrides]
    return load_config(files, needed)


def run_script(script, *arguments, path=None, **environment):
    """Run a script with only these settings, wherever the caller's own are."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("CODA_", "TPU_"))}
    search = f"{path}:{own['PATH']}" if path else own["PATH"]
    env = {**own, "CODA_ENV_FILE": "/dev/null", "PATH": search, **environment}
    return subprocess.run(["bash", str(script), *arguments], env=env, capture_output=True, text=True, cwd="/")


@pytest.fixture
def pod(tmp_path):
    """A folder with a `gcloud` that only writes down its arguments, and the settings that reach it."""
    gcloud = tmp_path / "bin" / "gcloud"
    gcloud.parent.mkdir()
    gcloud.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" '' >>{tmp_path}/arguments\n")
    gcloud.chmod(0o755)
    settings = {
        "TPU_NAME": "pod",
        "TPU_ZONE": "zone",
        "TPU_PROJECT": "project",
        "CODA_REPO_DIR": "/home/me/the repo",
        "CODA_REPO_URL": "url",
    }
    return gcloud.parent, settings, tmp_path / "arguments"


@pytest.mark.parametrize("hardware", [*DEVICES, "cpu", "gpu"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_configuration_fits_its_dataclass(repo, stage, hardware):
    config = stage_config(repo, stage, hardware)
    assert config.hardware.backend == {"cpu": "cpu", "gpu": "cuda", "h100_8": "cuda"}.get(hardware, "xla")
    kernel = {"cpu": "sdpa", "gpu": "flex_attention", "h100_8": "flex_attention"}.get(hardware, "splash")
    assert config.model.attn_implementation == kernel  # no (seq_len, seq_len) mask in the memory of an accelerator
    if hardware in DEVICES:
        assert hardware.startswith(config.hardware.chip.lower())


def test_every_yaml_is_tested_and_starts_with_a_command(repo):
    found = sorted((repo / "pre-train" / "configs").rglob("*.yaml"))
    files = [file for file in found if file.parent.name != "data"]  # those describe data sets
    sharding = {"fsdp", "fsdp_tensor"}  # test_sharding
    assert {file.stem for file in files} == {*STAGES, "adapt", "adapt_block", *DEVICES, "cpu", "gpu", *sharding}
    for file in files:
        first = file.read_text().splitlines()[0]
        assert re.match(r"# (bash pre-train/|python -m coda_pretrain |torchrun .* -m coda_pretrain )", first), file
        for script in re.findall(r"pre-train/\S+\.(?:sh|yaml)", first):
            assert (repo / script).is_file(), f"{file} names {script}"


def test_pretraining_is_that_of_the_report(repo):
    config = stage_config(repo, "pretrain")
    assert (config.max_steps, config.global_batch_size, config.seq_len) == (50_000, 512, 8192)
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("adafactor", 3e-4)
    assert (config.schedule.name, config.schedule.warmup_steps) == ("linear", 2000)
    assert config.masking.at(0.7, 1) == (0.01, 0.01, 0.01)
    assert [source.weight for source in config.data.sources] == [60.17, 50.75, 38.22, 12.98, 9.18, 5.41, 3.24]


def test_midtraining_is_that_of_the_report(repo):
    config = stage_config(repo, "midtrain")
    assert (config.max_steps, config.global_batch_size, config.seq_len) == (50_000, 256, 8192)
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("adafactor", 2e-4)
    assert (config.schedule.name, config.schedule.warmup_steps) == ("linear", 2000)
    epochs = [step * 256 // config.data.epoch_samples for step in range(50_000)]
    assert [epochs.count(epoch) for epoch in range(5)] == [10_000] * 5
    assert tuple(config.masking.at(0.0, epoch) for epoch in range(5)) == TABLE_3
    tokens = config.data.epoch_samples * config.seq_len
    assert tokens == pytest.approx(20.97e9, rel=1e-3)
    assert sum(source.weight for source in config.data.sources) == pytest.approx(20.97)


@pytest.mark.parametrize("machine", DEVICES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_recipe_resolves_to_a_run_that_fits_its_machine(repo, stage, machine):
    result = run_script(
        repo / "pre-train" / "recipes" / f"{stage}_{machine}.sh", "--dry_run", "max_steps=7", **SETTINGS, TPU_NAME="pod"
    )
    assert result.returncode == 0, result.stderr
    config = from_dict(RunConfig, yaml.safe_load(result.stdout))
    assert config.max_steps == 7
    assert config.output_dir == f"/runs/{stage}_{machine}"
    assert config.checkpoint.folder == f"/runs/{stage}_{machine}/checkpoints"
    assert config.hardware.compilation_cache == ("/runs/xla_cache" if machine in TPUS else None)
    assert config.data.root == "/data dir"
    assert config.model.init_from == {"pretrain": "/backbone", "midtrain": "/pretrained"}[stage]
    expected = stage_config(repo, stage)
    assert (config.masking, config.optimizer) == (expected.masking, expected.optimizer)
    data, fsdp, _ = config.hardware.mesh.shape(DEVICES[machine])
    assert config.rows_per_micro_batch % (data * fsdp) == 0


def scaled_down(repo, tmp_path, small, stage, machine):
    """The resolved recipe with a small model and batch, and each axis of its mesh that is split, over four devices."""
    script = repo / "pre-train" / "recipes" / f"{stage}_{machine}.sh"
    plain = yaml.safe_load(run_script(script, "--dry_run", **SETTINGS).stdout)
    hardware = plain["hardware"]
    parts = 1 if plain["micro_batch_size"] is None else plain["global_batch_size"] // plain["micro_batch_size"]
    split = hardware["mesh"]["tensor"] > 1
    mesh = {"data": 1, "fsdp": 2 if split or machine == "h100_8" else 4, "tensor": 2 if split else 1}
    machine_only = {"backend": "cpu", "compile": False, "num_threads": 1} if machine == "h100_8" else {}
    plain |= {
        **{name: small[name] for name in ("seq_len", "global_batch_size", "data")},
        "model": {**small["model"], "config": {**small["model"]["config"], "num_hidden_layers": 1}},
        "max_steps": 1,
        "micro_batch_size": small["global_batch_size"] // min(parts, 2),
        "output_dir": str(tmp_path / f"{stage}_{machine}"),
        "hardware": {**hardware, **machine_only, "mesh": mesh},
        "schedule": {**plain["schedule"], "warmup_steps": 1},
        "metrics": {"every": 1},
    }
    plain["checkpoint"]["folder"] = None
    plain["hardware"]["compilation_cache"] = None
    return plain


@pytest.mark.parametrize("machines", [TPUS, ("h100_8",)], ids=["TPUs", "GPUs"])
def test_every_recipe_trains_on_its_mesh_scaled_down(repo, tmp_path, run_config, drive, machines):
    configs = [scaled_down(repo, tmp_path, run_config, stage, machine) for stage in STAGES for machine in machines]
    runs = [{"config": config} for config in configs]
    if machines == TPUS:
        drive(runs, environment={"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"})
    else:
        drive(runs, num_processes=2)
    for config in configs:
        rows = read_rows(Path(config["output_dir"]) / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1], config["output_dir"]
        assert all(math.isfinite(row["loss"]) and row["mfu"] > 0 for row in rows)


def test_the_recipes_are_those_of_the_two_stages_and_of_the_backbones_that_are_adapted(repo):
    names = {path.stem for path in (repo / "pre-train" / "recipes").iterdir()}
    stages = {f"{stage}_{machine}" for stage in STAGES for machine in DEVICES}
    assert names == {"ckpt_consolidation", *stages, *ADAPTED}


@pytest.mark.parametrize("objective", ["masked", "block"])
@pytest.mark.parametrize("recipe", ADAPTED)
def test_an_adaptation_trains_and_exports_its_backbone_scaled_down(repo, tmp_path, run_config, recipe, objective):
    backbone = tmp_path / "backbone"
    autoregressive_folder(backbone, ADAPTED[recipe])
    settings = {"CODA_DATA_DIR": "/data dir", "CODA_OUTPUT_DIR": str(tmp_path), "CODA_BACKBONE_DIR": str(backbone)}
    script = repo / "pre-train" / "recipes" / f"{recipe}.sh"
    result = run_script(script, objective, "--dry_run", "max_steps=4", **settings)
    assert result.returncode == 0, result.stderr
    plain = yaml.safe_load(result.stdout)
    assert plain["output_dir"] == str(tmp_path / f"{recipe}_{objective}")
    assert plain["model"]["tokenizer"] == plain["model"]["init_from"] == str(backbone)
    assert plain["global_batch_size"] % plain["micro_batch_size"] == 0
    assert {source["path"] for source in plain["data"]["sources"]} <= {
        path.stem for path in (repo / "pre-train" / "configs" / "data").iterdir()
    }
    assert (plain["objective"], plain["blocks"]["growth_steps"]) == (
        objective,
        {"masked": None, "block": 2000}[objective],
    )
    plain |= {name: run_config[name] for name in ("seq_len", "global_batch_size", "data", "hardware", "metrics")}
    plain |= {"micro_batch_size": 4, "schedule": {**plain["schedule"], "warmup_steps": 2}}
    plain["model"]["attn_implementation"] = "sdpa"
    plain["blocks"]["growth_steps"] = 5 if objective == "block" else None
    plain["checkpoint"]["folder"] = None
    trainer = Trainer(from_dict(RunConfig, plain))
    trainer.train()
    trainer.close()
    rows = [row for row in read_rows(trainer.output_dir / "metrics.jsonl") if "loss" in row]
    assert [row.get("block_size") for row in rows] == ([1, 2, 4, 8] if objective == "block" else [None] * 4)
    assert all(math.isfinite(row["loss"]) for row in rows)
    export = tmp_path / "export"
    assert export_main(["--checkpoint_dir", str(trainer.output_dir), "--output_dir", str(export)]) == 0
    exported = CoDALanguageModel.from_pretrained(export).config
    assert exported.block_size == {"masked": None, "block": 32}[objective]
    assert exported.logits_shift


@pytest.mark.parametrize("recipe", ADAPTED)
def test_an_adaptation_is_planned_with_the_shape_of_its_backbone(repo, tmp_path, recipe, capsys, monkeypatch):
    """By the command that the recipe names."""
    monkeypatch.chdir(repo)
    backbone = tmp_path / "backbone"
    source = autoregressive_folder(backbone, ADAPTED[recipe])
    text = (repo / "pre-train" / "recipes" / f"{recipe}.sh").read_text()
    command = re.search(r"python -m coda_pretrain (plan .*?micro_batch_size=\d+)", text, re.DOTALL)[1]
    words = command.replace("\\\n#", "").replace("CODA_BACKBONE_DIR", str(backbone)).split()
    block = ["--config", "pre-train/configs/adapt_block.yaml"]
    plans = []
    for more in ([], block):
        assert main([*words, *more, "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    weights = sum(parameter.numel() for parameter in source.parameters())
    assert [plan["memory"]["remat"]["weights"] for plan in plans] == [4 * weights] * 2
    assert [plan["objective"] for plan in plans] == ["masked", "block"]
    assert plans[1]["days"] > plans[0]["days"]


def test_an_adaptation_asks_for_its_objective(repo):
    result = run_script(repo / "pre-train" / "recipes" / "adapt_smollm2_135m.sh", "--dry_run", **SETTINGS)
    assert result.returncode == 2
    assert "run_recipe.sh adapt MACHINE NAME masked|block" in result.stderr


def test_a_missing_setting_is_named(repo):
    result = run_script(repo / "pre-train" / "recipes" / "midtrain_v4_512.sh", "--dry_run", CODA_DATA_DIR="/d")
    assert result.returncode != 0
    assert "not set: CODA_OUTPUT_DIR CODA_TOKENIZER_DIR CODA_PRETRAINED_DIR. Set it in" in result.stderr


def test_settings_come_from_the_file_unless_the_environment_has_them(repo, tmp_path):
    text = (repo / "pre-train" / "env.example").read_text()
    for name, value in SETTINGS.items():
        text = re.sub(f"^{name}= *(#.*)$", rf"{name}={value} \1", text, flags=re.MULTILINE)
    (tmp_path / "env").write_text(text)
    recipe = repo / "pre-train" / "recipes" / "pretrain_v5p_64.sh"
    result = run_script(recipe, "--dry_run", CODA_ENV_FILE=str(tmp_path / "env"), CODA_OUTPUT_DIR="/elsewhere")
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load(result.stdout)
    assert config["data"]["root"] == "/data dir"
    assert config["output_dir"] == "/elsewhere/pretrain_v5p_64"


def test_a_line_of_the_settings_file_that_is_none_is_shown(repo, tmp_path):
    (tmp_path / "env").write_text("# comment\nexport X=1\n")
    result = run_script(repo / "pre-train" / "run_training.sh", "--dry_run", CODA_ENV_FILE=str(tmp_path / "env"))
    assert result.returncode != 0
    assert "expected KEY=value, got: export X=1" in result.stderr


def test_a_pod_gets_the_same_arguments_on_all_machines(repo, pod):
    path, settings, written = pod
    recipe = repo / "pre-train" / "recipes" / "pretrain_v4_1024.sh"
    result = run_script(recipe, "model.config={a: 'b c'}", path=path, **SETTINGS, **settings)
    assert result.returncode == 0, result.stderr
    started, followed = (call.splitlines() for call in written.read_text().strip("\n").split("\n\n"))
    assert started[:6] == followed[:6] == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone"]
    assert "--worker=all" in started
    words = shlex.split(started[-1])
    assert words[:3] == ["bash", "/home/me/the repo/pre-train/pod_run.sh", "start"]
    assert words[3:7] == ["--config", "pre-train/configs/pretrain.yaml", "--config"] + [
        "pre-train/configs/hardware/v4_1024.yaml"
    ]
    assert "data.root=/data dir" in words
    assert words[-1] == "model.config={a: 'b c'}"
    assert "--worker=0" in followed
    assert shlex.split(followed[-1]) == [*words[:2], "follow"]


@pytest.mark.parametrize(("word", "worker"), [("follow", "0"), ("status", "all"), ("stop", "all")])
def test_a_run_on_a_pod_is_followed_and_stopped_from_anywhere(repo, pod, word, worker):
    path, settings, written = pod
    result = run_script(repo / "pre-train" / "run_training.sh", f"--{word}", path=path, **settings)
    assert result.returncode == 0, result.stderr
    (call,) = written.read_text().strip("\n").split("\n\n")
    assert f"--worker={worker}" in call.splitlines()
    assert shlex.split(call.splitlines()[-1])[2:] == [word]


def test_a_detached_run_outlives_its_starter_and_is_one_at_a_time(repo, tmp_path):
    """Its log, its settings and its exit status reach whoever follows it; SIGTERM reaches the program itself."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\ntrap 'echo saved; exit 3' TERM\necho \"$@\" $WANDB_API_KEY $PJRT_DEVICE\n"
        "while :; do sleep 0.1; done\n"
    )
    python.chmod(0o755)
    (tmp_path / "env").write_text("WANDB_API_KEY=secret\n")
    settings = {
        "PYTHON": str(python),
        "CODA_ENV_FILE": str(tmp_path / "env"),
        "CODA_LOG_DIR": str(tmp_path / "log"),
        "PJRT_DEVICE": "",
    }

    def pod_run(*words):
        return run_script(repo / "pre-train" / "pod_run.sh", *words, **settings)

    assert pod_run("follow").returncode == 2
    started = pod_run("start", "max_steps=9", "model.config={a: 'b c'}")
    assert started.returncode == 0, started.stderr
    again = pod_run("start", "max_steps=9")
    assert again.returncode == 1
    assert "a run is going on here already" in again.stderr
    assert ": running (process " in pod_run("status").stdout
    assert "told to stop" in pod_run("stop").stdout
    followed = pod_run("follow")
    assert followed.returncode == 3
    assert followed.stdout.splitlines() == [
        "-m coda_pretrain max_steps=9 model.config={a: 'b c'} secret TPU",
        "saved",
    ]
    assert "not running, exit status 3" in pod_run("status").stdout


def test_setup_reaches_all_machines_and_needs_its_settings(repo, pod):
    path, settings, written = pod
    script = repo / "pre-train" / "setup_tpu.sh"
    result = run_script(script, path=path, **settings, CODA_BUCKET="bucket", CODA_MOUNT_DIR="/mnt/b")
    assert result.returncode == 0, result.stderr
    command = written.read_text().strip("\n").splitlines()[-1]
    assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
    assert shlex.split(command)[-5:] == [
        "CODA_BUCKET=bucket",
        "CODA_MOUNT_DIR=/mnt/b",
        "bash",
        "/home/me/the repo/pre-train/setup_tpu.sh",
        "--here",
    ]
    missing = run_script(script, path=path, TPU_NAME="pod")
    assert missing.returncode != 0
    assert "not set: TPU_ZONE TPU_PROJECT CODA_REPO_URL CODA_REPO_DIR" in missing.stderr


def test_consolidation_exports_the_newest_or_each_named_step(repo, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '%s ' \"$@\" >>{tmp_path}/calls\nprintf '\\n' >>{tmp_path}/calls\n")
    python.chmod(0o755)
    script = repo / "pre-train" / "recipes" / "ckpt_consolidation.sh"
    assert run_script(script, "/run", "/out", PYTHON=str(python)).returncode == 0
    assert run_script(script, "/run", "/out", "400", "00000800", PYTHON=str(python)).returncode == 0
    export = "-m coda_pretrain export --checkpoint_dir /run"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"{export} --output_dir /out ",
        f"{export} --step 400 --output_dir /out/step-00000400 ",
        f"{export} --step 800 --output_dir /out/step-00000800 ",
    ]
    refused = run_script(script, "/run", "/out", "latest", PYTHON=str(python))
    assert refused.returncode == 2
    assert "a step must be a whole number, got latest" in refused.stderr


@pytest.mark.parametrize("script", ["run_training.sh", "run_recipe.sh", "recipes/ckpt_consolidation.sh"])
def test_a_script_without_arguments_says_how_it_is_used(repo, script):
    result = run_script(repo / "pre-train" / script)
    assert result.returncode == 2
    assert f"bash pre-train/{script}" in result.stderr


def test_the_gpu_recipe_starts_one_process_per_gpu_on_this_machine(repo, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >{tmp_path}/arguments\n")
    python.chmod(0o755)
    recipe = repo / "pre-train" / "recipes" / "pretrain_h100_8.sh"
    result = run_script(recipe, "max_steps=9", **SETTINGS, PYTHON=str(python), TPU_NAME="pod")
    assert result.returncode == 0, result.stderr
    words = (tmp_path / "arguments").read_text().splitlines()
    assert words[:4] == ["-m", "torch.distributed.run", "--standalone", "--log-dir=/dev/null"]  # which leaves nothing
    assert words[4:8] == ["--nproc_per_node", "8", "-m", "coda_pretrain"]
    assert words[-1] == "max_steps=9"


def test_the_settings_file_reaches_all_machines_and_is_private_there(repo, pod, tmp_path):
    path, settings, _ = pod
    calls = tmp_path / "calls"
    (path / "gcloud").write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" '' >>{calls}\n")
    source = tmp_path / "env"
    source.write_text("WANDB_API_KEY=secret\n")
    script = repo / "pre-train" / "copy_env.sh"
    result = run_script(script, path=path, **settings, CODA_ENV_FILE=str(source))
    assert result.returncode == 0, result.stderr
    prepared, copied = (call.splitlines() for call in calls.read_text().strip("\n").split("\n\n"))
    assert prepared[3] == "ssh"
    assert copied[3:6] == ["scp", str(source), "pod:/home/me/the repo/pre-train/.env"]
    assert "--worker=all" in prepared
    assert "--worker=all" in copied
    target = tmp_path / "there"
    command = prepared[-1].replace("/home/me/the\\ repo/pre-train/.env", str(target))
    assert subprocess.run(["bash", "-c", command]).returncode == 0
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert "secret" not in calls.read_text()
    empty = run_script(script, path=path, **settings)
    assert empty.returncode == 2
    assert "nothing to copy" in empty.stderr


def test_scripts_pass_shellcheck(repo):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted(str(path) for path in (repo / "pre-train").rglob("*.sh"))
    result = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True, cwd=repo)
    assert result.returncode == 0, result.stdout
