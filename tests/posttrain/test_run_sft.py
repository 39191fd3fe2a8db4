"""The script that runs configurations in order."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

FAKE_PYTHON = """#!/usr/bin/env bash
# Stands for the interpreter: answers `get` from the YAML, `identity` with its arguments and $DATA, records `train`,
# fails where it is told to.
if [ "$1" = -c ]; then exit 0; fi
shift 2
if [ "$1" = get ]; then sed -n "s/^$2: //p" "$3"; exit 0; fi
if [ "$1" = identity ]; then shift; echo "$@" "$DATA" | cksum; exit 0; fi
echo "$@" >> "$CALLS"
case "$*" in *"$FAIL_AT"*) exit 3 ;; esac
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    for name in ("first", "second"):
        (tmp_path / f"{name}.yaml").write_text("finetuning_type: full\n")

    def call(*arguments: str, fail_at: str = "never", data: str = "") -> tuple[int, str, list[str]]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        environment = {**os.environ, "PYTHON": str(fake), "CALLS": str(calls), "FAIL_AT": fail_at, "DATA": data}
        result = subprocess.run(
            ["bash", str(REPO / "run_sft.sh"), *arguments],
            env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        lines = calls.read_text().splitlines() if calls.exists() else []
        return result.returncode, result.stdout + result.stderr, lines

    return call


def test_default_is_stage_1_then_stage_2_from_its_output(run):
    status, _, calls = run("model_name_or_path=M", "output_dir=out", "diffusion.t_min=0.01")
    assert status == 0
    assert [call.split()[1].rsplit("/", 1)[1] for call in calls] == ["coda_sft_stage1.yaml", "coda_sft_stage2.yaml"]
    assert "model_name_or_path=M output_dir=out/coda_sft_stage1 diffusion.t_min=0.01" in calls[0]
    assert "model_name_or_path=out/coda_sft_stage1 output_dir=out/coda_sft_stage2 diffusion.t_min=0.01" in calls[1]


def test_one_configuration_gets_the_folder_itself(run, tmp_path):
    status, output, calls = run("first.yaml", "model_name_or_path=M", "output_dir=out")
    assert (status, len(calls)) == (0, 1)
    assert calls[0].endswith("first.yaml model_name_or_path=M output_dir=out")
    assert (tmp_path / "out/train.log").exists()


def test_failure_names_the_stage_and_stops(run):
    status, output, calls = run("first.yaml", "second.yaml", "model_name_or_path=M", "output_dir=o", fail_at="first")
    assert (status, len(calls)) == (1, 1)
    assert "FAILED in first (1 of 2)" in output


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_to_the_script_alone_ends_what_it_runs_and_the_run_is_not_taken_for_finished(
    run, tmp_path, number, expected
):
    fake = tmp_path / "python"
    waits = 'trap "echo ending; exit 7" TERM; echo begun; echo $$ > pid; exec 2>&1; while :; do sleep 0.05; done'
    fake.write_text(fake.read_text().replace('case "$*" in', f'if [ -n "$WAIT" ]; then {waits}; fi\ncase "$*" in'))
    environment = {**os.environ, "PYTHON": str(fake), "CALLS": str(tmp_path / "calls"), "FAIL_AT": "never", "WAIT": "1"}
    command = ["bash", str(REPO / "run_sft.sh"), "first.yaml", "second.yaml", "model_name_or_path=M", "output_dir=o"]
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as script:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert script.poll() is None
            time.sleep(0.02)
        script.send_signal(number)
        output, _ = script.communicate(timeout=20)
    assert script.returncode == expected
    assert output.endswith(
        "begun\nending\nrun_sft.sh: stopped in first (1 of 2); the same command continues from the last checkpoint\n"
    )
    assert (tmp_path / "o/first/train.log").read_text() == "begun\nending\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not (tmp_path / "o/first/.finished").exists()
    status, _, calls = run("first.yaml", "second.yaml", "model_name_or_path=M", "output_dir=o")
    assert (status, len(calls)) == (0, 2)


def test_finished_runs_are_not_repeated_and_never_mixed_up(run):
    arguments = ("first.yaml", "second.yaml", "model_name_or_path=M", "output_dir=o")
    assert run(*arguments, fail_at="second.yaml")[0] == 1
    status, output, calls = run(*arguments)
    assert (status, len(calls)) == (0, 1)
    assert "first (1 of 2) is already finished" in output
    status, output, calls = run(*arguments, "learning_rate=1")
    assert (status, calls) == (2, [])
    assert "finished run with other settings" in output
    status, output, calls = run(*arguments, data="other rows under the same name")
    assert (status, calls) == (2, [])
    assert "model or data" in output


@pytest.mark.parametrize("name", ["a,b [1]", "o'neil", 'q"x"', "x=y", "40000", "$(touch no)", "a  b"])
def test_folders_of_any_name_arrive_as_they_are(run, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "c.yaml").write_text("finetuning_type: full\n")
    status, output, calls = run(f"{folder}/c.yaml", f"model_name_or_path={folder}/M", f"output_dir={folder}/out")
    assert (status, len(calls)) == (0, 1), output
    assert calls[0].endswith(f"{folder}/c.yaml model_name_or_path={folder}/M output_dir={folder}/out")
    assert (folder / "out/.finished").exists()


def test_configurations_of_one_name_would_share_a_folder(run, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more/first.yaml").write_text("finetuning_type: full\n")
    status, output, calls = run("first.yaml", "more/first.yaml", "model_name_or_path=M", "output_dir=o")
    assert (status, calls) == (2, [])
    assert "several configurations are called first" in output


def test_bad_arguments_are_refused(run, tmp_path):
    assert run("first")[0] == 2
    assert "needs model_name_or_path" in run("first.yaml", "output_dir=o")[1]
    (tmp_path / "first.yaml").write_text("finetuning_type: lora\n")
    status, output, _ = run("first.yaml", "second.yaml", "model_name_or_path=M", "output_dir=o")
    assert status == 2
    assert "trains an adapter; merge it" in output
