"""The command line is lm-eval's, with our model and tasks in it."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from coda_eval import __main__, comparison
from coda_eval.__main__ import COMMANDS, TASKS, THEIRS, add_our_tasks, lm_eval_arguments
from CoDALanguageModel.errors import UserError


def test_our_tasks_come_first_and_the_users_are_kept(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("include_path: from_yaml\n")
    for given, file, expected in ((None, None, []), ("a", None, ["a"]), (None, str(config), ["from_yaml"])):
        args = add_our_tasks(argparse.Namespace(include_path=given, config=file))
        assert args.include_path == [str(TASKS), *expected]


def test_arguments_that_lm_eval_takes_for_json_are_told(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["coda_eval"])
    with pytest.raises(UserError, match="Invalid JSON: pretrained={x"):
        lm_eval_arguments(["run", "--tasks", "a", "--model_args", "pretrained={x,steps=8"])


def command_line(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "coda_eval", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def test_every_command_is_known_and_an_unknown_one_is_told():
    done = command_line("jugde", "x")
    assert done.returncode == 1
    assert "unknown command 'jugde'; did you mean 'judge'? (known: run, ls, validate, compare, judge," in done.stderr
    assert all(name in command_line("--help").stdout for name in (*COMMANDS, *THEIRS))


def write_card(folder):
    folder.mkdir()
    card = {"task": "t", "metric": "acc", "filter": "none", "score": 0.5, "settings": {"model": "caf\u00e9"}}
    (folder / "scores.json").write_text(json.dumps([card]))
    return folder


def test_what_is_printed_suits_any_terminal_and_any_reader(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = command_line("leaderboard", write_card(tmp_path / "caf\udce9"), env=environment)
    assert done.returncode == 0, done.stderr
    assert "| caf\\xe9 | 50.0 % |" in done.stdout
    assert "caf\\udce9 |" in done.stdout
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "coda_eval", "leaderboard", str(tmp_path)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_in_order(monkeypatch, capsys, number):
    """`with` blocks are left, and no traceback is shown."""
    left = []

    def main_of(argv):
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            left.append(argv)

    monkeypatch.setattr(comparison, "main", main_of)
    monkeypatch.setattr(sys, "argv", ["coda_eval", "compare", "a", "b"])
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert (end.value.code, left) == (128 + number, [["a", "b"]])
    assert capsys.readouterr().err == f"coda_eval: stopped by {number.name}\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_task_files_load_and_do_not_take_names_of_lm_eval(tasks):
    names = {path.stem for path in TASKS.glob("*.yaml") if not path.stem.startswith("_")}
    assert set(tasks.all_tasks) == names
    assert all(name.startswith(("coda_", "quickstart_")) for name in names)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("run --model coda --model_args pretrained=m --tasks quickstart_problems", "line 1 must be a JSON object"),
        ("judge nowhere", "no command.json in 'nowhere'"),
    ],
)
def test_what_is_wrong_with_a_command_is_said_before_torch_is_loaded(data_dir, command, said):
    (data_dir / "quickstart_problems.jsonl").write_text("[]\n")
    code = (
        "import sys\n"
        "from coda_eval.__main__ import main\n"
        f"sys.argv[1:] = {command!r}.split()\n"
        "try:\n    main()\nfinally:\n    print(*({'torch', 'transformers'} & sys.modules.keys()), 'loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stdout.strip() == "loaded"


def test_humaneval_runs_offline_from_the_command_line(model_dir, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_ALLOW_CODE_EVAL", None)
    settings = f"pretrained={model_dir},steps=4,max_new_tokens=4,temperature=0.1"
    command = [sys.executable, "-m", "coda_eval", "--model", "diffllm", "--model_args", settings]
    command += ["--tasks", "coda_humaneval", "--limit", "3", "--device", "cpu", "--batch_size", "2"]
    command += ["--output_path", str(tmp_path), "--log_samples", "--gen_kwargs", "top_p=0.9"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = tmp_path.rglob("results_*.json")
    run = json.loads(results.read_text())
    assert run["results"]["coda_humaneval"]["pass@1,run"] == 0.0
    assert run["n-samples"]["coda_humaneval"]["effective"] == 3
    assert run["config"]["generation_settings"] == {"max_new_tokens": 4, "steps": 4, "temperature": 0.1}
    (samples,) = tmp_path.rglob("samples_coda_humaneval_*.jsonl")
    records = [json.loads(json.loads(line)["filtered_resps"][0][0]) for line in samples.read_text().splitlines()]
    assert all({"status", "error", "seconds", "isolation", "new_tokens", "forwards"} <= r.keys() for r in records)
    assert all(1 <= r["forwards"] <= 4 for r in records)


def test_the_scripts_say_what_their_python_lacks(repo, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    for name in ("eval_mbpp_humaneval.sh", "eval_infilling.sh"):
        script = ["bash", str(repo / "evaluation" / "lm_eval" / name), "MODEL"]
        environment = {**os.environ, "PYTHON": str(tmp_path / "python")}
        result = subprocess.run(script, env=environment, capture_output=True, text=True, cwd="/")
        assert result.returncode == 2
        assert f"{tmp_path}/python has no coda_eval; run: bash {repo}/setup_env.sh" in result.stderr


RECORDER = """#!/bin/sh
case "$*" in
  *torch*device_count*) echo 0 ;;
  *find_spec*) exit 0 ;;
  "-m coda_eval run"*) printf '%s\\n' "$@" >"$RECORD/run"
    for last in "$@"; do [ "$before" = --output_path ] && output=$last; before=$last; done
    mkdir -p "$output/m" && echo '{}' >"$output/m/results_1.json"
    exit "${STATUS:-0}" ;;
  *) exec "$REAL" "$@" ;;
esac
"""


@pytest.fixture
def script(repo, tmp_path):
    """Function that runs an evaluation script with a Python that notes what it is asked to run."""
    (tmp_path / "python").write_text(RECORDER)
    (tmp_path / "python").chmod(0o755)

    def call(name, *arguments, **variables):
        (tmp_path / "run").unlink(missing_ok=True)
        environment = {
            **os.environ,
            "PYTHON": str(tmp_path / "python"),
            "REAL": sys.executable,
            "RECORD": str(tmp_path),
        }
        command = ["bash", str(repo / "evaluation" / "lm_eval" / name), *arguments]
        result = subprocess.run(
            command, env={**environment, **variables}, capture_output=True, text=True, cwd=tmp_path, timeout=60
        )
        noted = tmp_path / "run"
        return result, noted.read_text().splitlines() if noted.exists() else []

    return call


def _value(arguments, flag):
    return arguments[arguments.index(flag) + 1]


@pytest.mark.parametrize("name", ["a,b", "o'neil/model", "run(1/model", "40000", "a=b c", "{x}", "[1]", '"q"', "None"])
def test_any_folder_name_reaches_the_model(script, name):
    _, arguments = script("eval_mbpp_humaneval.sh", name)
    settings = json.loads(_value(arguments, "--model_args"))
    assert settings == {
        "pretrained": name,
        "dtype": "float32",
        "steps": 768,
        "alg": "entropy",
        "temperature": 0.1,
        "top_p": 0.9,
        "max_new_tokens": 768,
    }


def test_all_tasks_run_in_one_process_and_the_environment_is_heard(script, tmp_path):
    variables = {
        "STEPS": "4",
        "MAX_NEW_TOKENS": "8",
        "TOP_P": "x",
        "BATCH_SIZE": "3",
        "LIMIT": "2",
        "DTYPE": "bfloat16",
    }
    result, arguments = script("eval_mbpp_humaneval.sh", "m", "--seed", "1", OUTPUT_DIR="out", **variables)
    assert result.returncode == 0
    at = arguments.index("--tasks")
    tasks = [f"coda_{name}_instruct" for name in ("humaneval", "humaneval_plus", "mbpp", "mbpp_plus")]
    assert arguments[at + 1 : at + 5] == tasks
    settings = json.loads(_value(arguments, "--model_args"))
    assert (settings["steps"], settings["max_new_tokens"], settings["top_p"]) == (4, 8, "x")
    assert settings["dtype"] == "bfloat16"
    assert [_value(arguments, flag) for flag in ("--batch_size", "--limit", "--seed")] == ["3", "2", "1"]
    assert "--apply_chat_template" in arguments
    assert (tmp_path / "out" / "run.log").exists()
    baseline, arguments = script("eval_mbpp_humaneval.sh", "m", MODEL="hf", TASKS=" a  b ", OUTPUT_DIR="hf")
    assert json.loads(_value(arguments, "--model_args")) == {"pretrained": "m", "dtype": "float32"}
    assert "--gen_kwargs" not in arguments
    assert arguments[arguments.index("--tasks") + 1 :][:3] == ["a", "b", "--batch_size"]


def test_another_model_hears_the_environment_too_and_what_it_cannot_do_is_refused(script):
    variables = {"MODEL": "hf", "MAX_NEW_TOKENS": "64", "TEMPERATURE": "0.5", "TOP_P": "0.9", "OUTPUT_DIR": "hf"}
    _, arguments = script("eval_mbpp_humaneval.sh", "m", **variables)
    heard = {"max_gen_toks": 64, "temperature": 0.5, "do_sample": True, "top_p": 0.9}
    assert json.loads(_value(arguments, "--gen_kwargs")) == heard
    _, arguments = script("eval_mbpp_humaneval.sh", "m", MODEL="hf", TEMPERATURE="0.0", OUTPUT_DIR="greedy")
    assert json.loads(_value(arguments, "--gen_kwargs")) == {"temperature": 0.0, "do_sample": False}
    refused, arguments = script("eval_mbpp_humaneval.sh", "m", MODEL="hf", STEPS="4")
    assert (refused.returncode, arguments) == (2, [])
    assert "STEPS and ALG say nothing with MODEL=hf" in refused.stderr


def test_gap_lengths_reach_the_problems(script):
    for given, expected in (("true", "true"), ("32", 32), ("a'b", "a'b")):
        _, arguments = script("eval_infilling.sh", "m", GAP_LENGTH=given, OUTPUT_DIR=f"gaps_{given}")
        assert json.loads(_value(arguments, "--metadata")) == {"gap_length": expected}
        assert "--apply_chat_template" not in arguments


def test_a_failing_task_fails_the_script(script, tmp_path):
    result, _ = script("eval_mbpp_humaneval.sh", "m", STATUS="1", OUTPUT_DIR="out")
    assert result.returncode == 1


def test_scripts_take_a_fresh_folder_each_time(script, tmp_path):
    for _ in range(2):
        assert script("eval_mbpp_humaneval.sh", "path/to/model")[0].returncode == 0
    assert len(list((tmp_path / "runs" / "eval" / "model").iterdir())) == 2
    assert script("eval_infilling.sh", "m", OUTPUT_DIR="out")[0].returncode == 0
    again, arguments = script("eval_infilling.sh", "m", OUTPUT_DIR="out")
    assert again.returncode == 2
    assert "OUTPUT_DIR out holds results of an earlier run (out/m/results_1.json)" in again.stderr
    assert arguments == []
    resumed, arguments = script("eval_infilling.sh", "m", "--resume", OUTPUT_DIR="out")
    assert resumed.returncode == 0
    assert "--resume" in arguments
