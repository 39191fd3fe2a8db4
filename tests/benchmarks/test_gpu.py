"""`benchmarks/gpu.sh`: every section runs in tiny shapes, and what fails or takes too long leaves the others alone."""

import json
import subprocess
import sys
import time

import pytest


@pytest.fixture(autouse=True)
def _benchmarks(repo, monkeypatch):
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))


@pytest.fixture
def records(monkeypatch):
    """What sections that run in this process measure."""
    from gpu import adaptation, section

    found = []
    for module in (section, adaptation):
        monkeypatch.setattr(module, "emit", lambda facts: found.append(json.loads(json.dumps(facts))))
    return found


def run(name, tmp_path, weights=None):
    import importlib

    import torch
    from gpu.__main__ import SECTIONS
    from gpu.section import Section

    module, _, function = SECTIONS[name][0].partition(":")
    section = Section(torch.device("cpu"), True, weights, time.monotonic() + 600, tmp_path)
    getattr(importlib.import_module(module), function)(section)


@pytest.mark.parametrize(
    "name", ["kernels", "invariance", "decoding", "blocks", "sft_step", "pretrain_step", "adaptation"]
)
def test_a_section_runs_to_its_end_in_tiny_shapes(name, tmp_path, records):
    run(name, tmp_path)
    assert records
    errors = [facts for facts in records if "error" in facts]
    assert not errors
    if name == "kernels":
        compared = [facts for facts in records if "gradient_error" in facts]
        assert {facts["kernel"] for facts in compared} == {"eager", "sdpa"}
        assert all(facts["gradient_error"] < 1e-5 for facts in compared if facts["precision"] == "fp32")
    if name == "blocks":
        assert all(f["tokens_equal_to_cached"] == 1 for f in records if f.get("way") == "recomputed")
    if name == "adaptation":
        assert [f["when"] for f in records if f.get("what") == "infilling"][1:] == ["before", "after"]
        assert all("curve" in f for f in records if "steps" in f)


def test_flex_attention_has_a_graph_for_each_case_that_kernels_are_compared_in(tmp_path, records, monkeypatch):
    import torch
    from gpu import kernels

    limits = []

    def note(model, batch, kernel, autocast):
        config = torch._dynamo.config
        limits.append((config.recompile_limit, config.fail_on_recompile_limit_hit))
        return kernels.Found([torch.ones(1)] * 3)

    monkeypatch.setattr(kernels, "scores_and_gradients", note)
    before = torch._dynamo.config.recompile_limit
    run("kernels", tmp_path)
    cases = len(kernels.PRECISIONS) * 5
    assert limits
    assert all(limit >= 2 * cases and is_told for limit, is_told in limits)  # with a gradient and without
    assert torch._dynamo.config.recompile_limit == before


def test_sections_load_where_nothing_but_what_the_script_names_is_installed(repo):
    absent = (
        "accelerate datasets fastapi gcsfs llamafactory lm_eval matplotlib omegaconf pandas sklearn torch_xla upath"
    )
    program = f"""
import sys
sys.path[:0] = [{str(repo)!r}, *({str(repo)!r} + "/" + x for x in ("pre-train", "post-train", "benchmarks"))]
sys.modules |= dict.fromkeys({absent.split()!r})
import gpu.kernels, gpu.invariance, gpu.decoding, gpu.training, gpu.adaptation
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_measurement_that_fails_or_has_no_time_is_reported_and_the_next_one_is_made(tmp_path, records):
    import torch
    from gpu.section import Section

    section = Section(torch.device("cpu"), False, None, time.monotonic() + 5, tmp_path)
    with section.measurement(name="broken") as facts:
        facts["half"] = 1
        raise RuntimeError("out of memory")
    with section.measurement(name="long"):
        section.require(60)
    with section.measurement(name="good") as facts:
        facts["value"] = 2
    broken, long, good = records
    assert broken["error"] == "RuntimeError: out of memory"
    assert broken["half"] == 1
    assert "60 s" in long["skipped"]
    assert "value" not in long
    assert good["value"] == 2


def test_a_section_that_fails_or_takes_too_long_keeps_what_it_measured_and_others_run(tmp_path):
    from gpu.__main__ import READY, run_all
    from gpu.report import RECORD, Report

    head = f"import json, sys, time; print({READY!r}, flush=True); sys.stdin.readline()"
    head += f"; say = lambda **x: print({RECORD!r} + json.dumps(x), flush=True)"
    programs = {
        "kernels": "say(environment={'card': 'none'}); say(value=1); raise ValueError('no such kernel')",
        "invariance": "say(value=2); time.sleep(60)",
        "decoding": "say(value=3); print('|')",
    }
    commands = {name: [sys.executable, "-c", f"{head}\n{body}"] for name, body in programs.items()}
    started = time.monotonic()
    run_all(commands, 6.0, Report(tmp_path, {}))
    assert time.monotonic() - started < 20
    whole = json.loads((tmp_path / "gpu.json").read_text())
    sections = whole["sections"]
    assert [section["measurements"] for section in sections.values()] == [
        [{"value": 1}],
        [{"value": 2}],
        [{"value": 3}],
    ]
    assert sections["kernels"]["outcome"] == "failed with status 1"
    assert sections["kernels"]["tail"][-1] == "ValueError: no such kernel"
    assert sections["invariance"]["outcome"].startswith("killed after")
    assert sections["decoding"]["outcome"] == "done"
    text = (tmp_path / "gpu.md").read_text()
    assert "ValueError: no such kernel" in text
    assert "card none" in text


def test_measurements_go_on_where_the_report_cannot_be_written(tmp_path, capsys):
    from gpu.__main__ import READY, run_all
    from gpu.report import RECORD, Report

    (tmp_path / "gpu.log").symlink_to("/dev/full")
    (tmp_path / "gpu.json").mkdir()
    head = f"import sys; print({READY!r}, flush=True); sys.stdin.readline(); print('a warning')"
    names = ("kernels", "invariance")
    commands = {name: [sys.executable, "-c", f"{head}; print({RECORD!r} + '{{\"value\": 7}}')"] for name in names}
    report = Report(tmp_path, {})
    run_all(commands, 20.0, report)
    assert [section["measurements"] for section in report.sections.values()] == [[{"value": 7}]] * 2
    said = capsys.readouterr().out
    assert "invariance: value 7" in said
    assert "No space left on device" in said


def test_a_record_counts_behind_an_unfinished_line_and_one_that_is_torn_is_log(tmp_path):
    from gpu.report import RECORD, Report

    report = Report(tmp_path, {})
    report.start("kernels", 5)
    assert report.take("kernels", f'compiling ...{RECORD}{{"value": 1}}')
    assert not report.take("kernels", f'{RECORD}{{"value": 2, a warning')
    assert report.take("kernels", f'{RECORD}{{"value": 3}}')
    assert report.sections["kernels"]["measurements"] == [{"value": 1}, {"value": 3}]
    assert "a warning" in (tmp_path / "gpu.log").read_text()


def test_a_sections_process_keeps_its_modules_out_of_garbage_collection_and_ends_with_its_section(repo, tmp_path):
    (tmp_path / "probe.py").write_text(
        "import gc, threading, time\n"
        "from gpu.section import emit\n"
        "def run(section):\n"
        "    emit({'frozen': gc.get_freeze_count(), 'left': len(gc.get_objects())})\n"
        "    threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "    raise ValueError('out of order')\n"
    )
    program = f"""
import argparse, sys
sys.path[:0] = [{str(repo)!r}, {str(repo / "benchmarks")!r}, {str(tmp_path)!r}]
import gpu.__main__ as kit
kit.SECTIONS = {{"probe": ("probe:run", 1)}}
kit.work("probe", argparse.Namespace(tiny=True, weights=None))
"""
    given = f"{time.monotonic() + 600}\n"
    done = subprocess.run([sys.executable, "-c", program], input=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ValueError: out of order" in done.stderr
    facts = json.loads(next(line for line in done.stdout.splitlines() if "frozen" in line).removeprefix("@record "))
    assert facts["frozen"] > 10 * facts["left"]


def test_unknown_sections_weights_and_outputs_are_refused_before_anything_runs(repo, tmp_path):
    (tmp_path / "file").touch()
    for given in (
        ["--sections", "kernels,speed"],
        ["--weights", str(tmp_path)],
        ["--output", str(tmp_path / "file" / "x")],
    ):
        command = ["bash", repo / "benchmarks" / "gpu.sh", "--output", tmp_path / "out", *given]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert given[1].split(",")[-1] in done.stderr
        assert not (tmp_path / "out").exists()
