"""The stages fit together: every file that one reads, an earlier one writes, and the rooms accept the settings."""

import json
from pathlib import Path

import pytest
import yaml

from coda_quickstart.__main__ import REPOSITORY, build_parser, main
from coda_quickstart.prepare import load_settings
from coda_quickstart.stages import build_stages
from CoDALanguageModel import DiffusionGenerationConfig
from CoDALanguageModel.decoding_settings import SETTINGS

CONFIGS = REPOSITORY / "quickstart" / "configs"


@pytest.fixture(params=[{}, {"compare": True, "seeds": (1,)}], ids=["loop", "compare"])
def stages(tmp_path, request):
    settings = yaml.safe_load((CONFIGS / "eval.yaml").read_text())
    return build_stages(REPOSITORY, tmp_path, CONFIGS, settings, **request.param)


@pytest.mark.parametrize(
    ("more", "added"),
    [
        ({"compare": True}, {"pretrain_blocks", "sft_blocks", "evaluate_blocks"}),
        ({"seeds": (1, 2)}, {"pretrain_seed_1", "sft_seed_2", "evaluate_seed_2"}),
    ],
)
def test_comparisons_and_seeds_add_stages_and_change_none(tmp_path, more, added):
    settings = yaml.safe_load((CONFIGS / "eval.yaml").read_text())
    loop, all_stages = (build_stages(REPOSITORY, tmp_path, CONFIGS, settings, **chosen) for chosen in ({}, more))
    assert all_stages[: len(loop)] == loop
    assert len({stage.name for stage in all_stages}) == len(all_stages)
    assert {stage.name for stage in all_stages[len(loop) :]} >= added


def test_the_first_answer_appears_before_fine_tuning(stages):
    names = [stage.name for stage in stages]
    assert names.index("midtrain") < names.index("first") < names.index("sft")


@pytest.mark.parametrize("attention", ["full", "block_causal"])
def test_a_models_folder_says_how_it_is_to_decode(tmp_path, attention):
    before = DiffusionGenerationConfig(max_new_tokens=512, temperature=0.1)
    before.save_pretrained(tmp_path)
    model = tmp_path / "config.json"
    model.write_text(json.dumps({"attention": attention, "max_position_embeddings": 1024}))
    assert main(["settings", "--folder", str(tmp_path), "--config", str(CONFIGS / "eval.yaml")]) == 0
    after = DiffusionGenerationConfig.from_pretrained(tmp_path)
    scored = yaml.safe_load((CONFIGS / "eval.yaml").read_text())["generation"]
    assert scored.pop("steps") < after.steps == before.steps  # one for each token of an answer of any length
    assert {name: getattr(after, name) for name in scored} == scored
    silent = {name for name, setting in SETTINGS.items() if getattr(after, name) == setting.default}
    decided_by_a_server = {name for name in silent if SETTINGS[name].served is not None}
    assert decided_by_a_server == (set() if attention == "full" else {"block_length"})  # a block model has its own
    config = tmp_path / "eval.yaml"
    config.write_text("generation: {max_new_token: 40}\n")
    assert main(["settings", "--folder", str(tmp_path), "--config", str(config)]) == 2


def test_a_seed_changes_all_training_and_no_data(tmp_path):
    settings = yaml.safe_load((CONFIGS / "eval.yaml").read_text())
    stages = {stage.name: stage for stage in build_stages(REPOSITORY, tmp_path, CONFIGS, settings, seeds=(7,))}
    for name in ("pretrain", "midtrain", "sft"):
        own, other = stages[name], stages[f"{name}_seed_7"]
        assert "seed=7" in other.commands[0]
        assert "seed=7" not in own.commands[0]
        assert {path for path in own.inputs if "data" in path.parts} <= set(other.inputs)


def test_every_input_is_a_file_of_the_repository_or_written_by_an_earlier_stage(stages, tmp_path):
    written: set[Path] = set()
    for stage in stages:
        for path in stage.inputs:
            assert path in written if path.is_relative_to(tmp_path) else path.is_file(), (stage.name, path)
        written |= set(stage.outputs)


def test_rooms_are_only_called_by_command_line(stages):
    modules = [command[2] for stage in stages for command in stage.commands if command[1] == "-m"]
    assert {"coda_pretrain", "coda_eval"} <= set(modules)
    scripts = [Path(command[1]).name for stage in stages for command in stage.commands if command[1] != "-m"]
    assert scripts in (["save_hf_model.py", "run_sft.sh"], 3 * ["save_hf_model.py", "run_sft.sh"])


def test_a_stage_removes_no_file_of_another_stage(stages):
    for stage in stages:
        for other in stages:
            for path in other.outputs if other is not stage else ():
                assert not any(path.is_relative_to(folder) for folder in stage.replaces), (stage.name, path)


def test_the_masking_follows_the_report():
    pretrain = yaml.safe_load((CONFIGS / "pretrain.yaml").read_text())["masking"]
    assert [pretrain[f"{name}_probability"] for name in ("prefix", "truncate", "span")] == [0.01, 0.01, 0.01]
    midtrain = yaml.safe_load((CONFIGS / "midtrain.yaml").read_text())
    assert midtrain["masking"]["per_epoch"] == [
        [0.01, 0.01, 0.05],
        [0.05, 0.05, 0.10],
        [0.10, 0.10, 0.15],
        [0.15, 0.15, 0.20],
        [0.20, 0.20, 0.25],
    ]
    epochs = midtrain["max_steps"] * midtrain["global_batch_size"] / midtrain["data"]["epoch_samples"]
    assert epochs == 5


def test_the_instruction_set_is_as_large_as_promised():
    settings = load_settings(CONFIGS / "data.yaml")
    assert settings.training_programs >= 2000
    assert settings.problems >= 100


def test_the_pretraining_room_accepts_the_configs(stages, capsys):
    from coda_pretrain.config import load_config

    for stage in stages:
        name = stage.name.removesuffix("_blocks").removesuffix("_seed_1")
        if name in ("pretrain", "midtrain"):
            command = stage.commands[0]
            config = load_config([command[4]], list(command[5:-2]))
            assert config.output_dir.endswith(name)
            assert config.seed == int(stage.name.endswith("_seed_1"))
            assert config.objective == ("block" if stage.name.endswith("_blocks") else "masked")


def test_the_evaluation_room_gets_a_folder_of_any_name(tmp_path, monkeypatch):
    from lm_eval.__main__ import HarnessCLI

    folder = tmp_path / "a,b=c 'd'"
    settings = yaml.safe_load((CONFIGS / "eval.yaml").read_text())
    evaluate = next(stage for stage in build_stages(REPOSITORY, folder, CONFIGS, settings) if stage.name == "evaluate")
    monkeypatch.setattr("sys.argv", ["coda_eval", *evaluate.commands[0][3:]])
    arguments = HarnessCLI().parse_args()
    assert arguments.model_args == {"pretrained": str(folder / "model"), **settings["generation"]}


def test_unknown_arguments_are_refused(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["run", "--frsh"])
    assert "--frsh" in capsys.readouterr().err


def test_an_unknown_option_is_answered_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--demoo"])
    told = capsys.readouterr().err
    assert "unrecognized arguments: --demoo" in told
    assert all(option in told for option in ("--demo]", "--serve", "--run_dir"))


@pytest.mark.parametrize("seeds", ["1,1", "", "-1", "1,a", "4294967296"])
def test_wrong_seeds_are_named(capsys, seeds):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["run", f"--seeds={seeds}"])
    told = f"--seeds: must be different whole numbers in [0, 4294967295], such as 0,1,2, got '{seeds}'"
    assert told in capsys.readouterr().err


def test_bad_input_is_a_message_and_a_status(capsys, tmp_path):
    assert main(["data", "--config", str(tmp_path / "no.yaml"), "--output_dir", str(tmp_path)]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["run", "--run_dir", str(tmp_path / "file" / "run")]) == 2
    assert f"--run_dir {tmp_path}/file/run cannot be used: " in capsys.readouterr().err
    for text, message in (("a: [", "cannot be read as YAML"), ("seed: 0", "lacks generation, batch_size")):
        for name in ("sft.yaml", "eval.yaml"):
            (tmp_path / name).write_text(text)
        assert main(["run", "--run_dir", str(tmp_path / "run"), "--config_dir", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
