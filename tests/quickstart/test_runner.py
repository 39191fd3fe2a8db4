"""Stages run once, run again when something they depend on changed, and fail with the end of their log."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from coda_quickstart import runner as runner_module
from coda_quickstart.runner import Runner, Stage, StageFailed, last_line, start_over
from CoDALanguageModel.errors import UserError


@pytest.fixture
def shown():
    return []


@pytest.fixture
def make(tmp_path, shown):
    (tmp_path / "in.txt").write_text("one")

    def run(code="open('out.txt', 'a').write(open('in.txt').read())", outputs=("out.txt",), environment=None):
        stage = Stage(
            name="copy",
            title="Copy",
            commands=((sys.executable, "-S", "-c", code),),
            inputs=(tmp_path / "in.txt",),
            outputs=tuple(tmp_path / name for name in outputs),
            replaces=(tmp_path / "out.txt",),
            environment=environment or {},
        )
        return Runner(tmp_path / "run", tmp_path, show=shown.append, progress_every_s=0.1).run([stage])

    return run


def test_a_finished_stage_is_skipped_and_its_time_remembered(make, shown, tmp_path):
    first = make()
    assert (tmp_path / "out.txt").read_text() == "one"
    assert make() == first
    assert "already done" in shown[-1]


@pytest.mark.parametrize("change", ["input", "command", "environment", "output", "missing"])
def test_a_stage_runs_again_when_something_changed(make, shown, tmp_path, change):
    make()
    arguments = {}
    if change == "input":
        (tmp_path / "in.txt").write_text("two")
    elif change == "command":
        arguments["code"] = "open('out.txt', 'w').write('other')"
    elif change == "environment":
        arguments["environment"] = {"A": "1"}
    elif change == "output":
        (tmp_path / "out.txt").write_text("damaged")
    else:
        (tmp_path / "out.txt").unlink()
    shown.clear()
    make(**arguments)
    assert not any("already done" in line for line in shown)
    expected = {"input": "two", "command": "other"}.get(change, "one")
    assert (tmp_path / "out.txt").read_text() == expected


def test_a_failed_command_stops_the_run_with_the_end_of_its_log(make):
    with pytest.raises(StageFailed, match="(?s)no such thing.*exit status 3; see .*copy.log"):
        make(code="print('no such thing'); raise SystemExit(3)")
    with pytest.raises(StageFailed):  # a failed stage is not remembered as done
        make(code="print('no such thing'); raise SystemExit(3)")


def test_a_stage_that_leaves_an_output_out_fails(make):
    with pytest.raises(StageFailed, match="finished without writing .*other.txt"):
        make(outputs=("out.txt", "other.txt"))


def test_progress_shows_the_last_line_of_the_log(make, shown):
    make(code="import time; print('step 7', flush=True); time.sleep(1.2); open('out.txt', 'w').write('x')")
    assert any("step 7" in line for line in shown)


def test_progress_on_a_terminal_is_a_line_that_fits_and_is_taken_back(make, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    make(code="import time; print('step 7' * 50, flush=True); time.sleep(1.6); open('out.txt', 'w').write('x')")
    written = capsys.readouterr().out
    lines = [line for line in written.replace("\033[K", "").split("\r") if line]
    assert lines
    assert all("step 7" in line and len(line) < 40 for line in lines)
    assert written.endswith("\r\033[K")  # what is said next stands on an empty line
    assert not any("step 7" in line for line in shown)


def test_the_end_of_a_command_is_not_waited_for_longer_than_it_takes(make, monkeypatch):
    monkeypatch.setattr(runner_module, "POLL_S", 20)
    assert make()["copy"] < 20


def test_the_last_line_of_a_progress_bar_is_its_newest_state(tmp_path):
    (tmp_path / "log").write_bytes(b"start\n 10%\r 20%\r\n\n")
    assert last_line(tmp_path / "log") == "20%"


def test_the_last_line_of_a_log_begins_with_what_it_says(tmp_path):
    (tmp_path / "log").write_text("2026-11-28 03:54:00,093 INFO coda_pretrain.watch.metrics: step 10/500  loss 6.602\n")
    assert last_line(tmp_path / "log") == "step 10/500  loss 6.602"


def test_fresh_removes_a_run_and_refuses_anything_else(tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "logs").mkdir(parents=True)
    start_over(run_dir)
    assert not run_dir.exists()
    start_over(run_dir)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="--fresh would delete .* which is no quickstart run"):
        start_over(tmp_path / "home")
    assert (tmp_path / "home" / "letter.txt").exists()


@pytest.fixture
def begun(tmp_path):
    """A run in `run` whose one stage sleeps, and the id of the stage's process."""
    script = f"""
from pathlib import Path
from coda_quickstart import __main__ as program
from coda_quickstart.runner import Runner, Stage
code = "import os, time; open('id', 'w').write(str(os.getpid())); time.sleep(60)"
stage = Stage(name="wait", title="Wait", commands=(({sys.executable!r}, "-S", "-c", code),), inputs=(), outputs=())
program._run = lambda arguments: Runner(Path("run").resolve(), Path.cwd()).run([stage])
program.main(["run", "--run_dir", "run"])
"""
    run = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.DEVNULL)
    stage_process = 0
    try:
        deadline = time.monotonic() + 30
        while not ((tmp_path / "id").exists() and (tmp_path / "id").read_text()):
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.05)
        stage_process = int((tmp_path / "id").read_text())
        yield run, stage_process
    finally:
        run.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(stage_process or run.pid, signal.SIGKILL)


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stage_ends_with_the_run_that_started_it(begun, number):
    run, stage_process = begun
    run.send_signal(number)
    assert run.wait(30) == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(stage_process, 0)


@pytest.mark.usefixtures("as_in_a_terminal")
def test_a_command_without_processes_of_its_own_ends_also_inside_of_a_library():
    script = (
        "from coda_quickstart import __main__ as program\n"
        "program._data = lambda arguments: print('begun', flush=True) or sum(range(10**11))  # hears no signal\n"
        "program.main(['data', '--config', 'x', '--output_dir', 'y'])\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "begun\n"
            process.terminate()
            assert process.wait(10) == -signal.SIGTERM
        finally:
            process.kill()


def test_a_folder_belongs_to_one_run_and_to_what_a_killed_one_leaves_behind(begun, make, tmp_path):
    run, stage_process = begun
    with pytest.raises(UserError, match=f"another run writes to {tmp_path / 'run'}, "):
        make()
    run.kill()
    run.wait()
    with pytest.raises(UserError, match="or a process of one that was killed"):
        start_over(tmp_path / "run")
    assert (tmp_path / "run" / "logs").is_dir()
    os.kill(stage_process, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while True:  # the system ends it when it comes to it
        try:
            make()
            break
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_what_is_asked_for_after_a_stage_follows_it_also_when_it_is_done_already(tmp_path):
    runner = Runner(tmp_path / "run", tmp_path, show=lambda line: None)
    stages = [
        Stage(
            name=name,
            title=name,
            commands=((sys.executable, "-S", "-c", f"open('{name}', 'w')"),),
            inputs=(),
            outputs=(tmp_path / name,),
        )
        for name in ("first", "second")
    ]
    there = []
    for _ in range(2):
        runner.run(stages, after={"first": lambda: there.append((tmp_path / "second").exists())})
    assert there == [False, True]
