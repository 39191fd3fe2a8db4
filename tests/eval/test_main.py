"""The command line is lm-eval's, with our model and tasks in it."""

import argparse
import json
import os
import subprocess
import sys

from coda_eval.__main__ import TASKS, add_our_tasks


def test_our_tasks_come_first_and_the_users_are_kept(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("include_path: from_yaml\n")
    for given, file, expected in ((None, None, []), ("a", None, ["a"]), (None, str(config), ["from_yaml"])):
        args = add_our_tasks(argparse.Namespace(include_path=given, config=file))
        assert args.include_path == [str(TASKS), *expected]


def test_task_files_load_and_do_not_take_names_of_lm_eval(tasks):
    names = {path.stem for path in TASKS.glob("*.yaml")} - {"_program_task"}
    assert set(tasks.all_tasks) == names
    assert all(name.startswith(("coda_", "quickstart_")) for name in names)


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
