"""A run that is killed and gone on with gives what it would have given; nothing meets an answer to another question."""

import dataclasses
import functools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from coda_eval import harness, programs, run, sandbox
from coda_eval.__main__ import main
from coda_eval.journal import Journal, Nats, code_version, hash_tokenizer, hash_weights, known_likelihood
from coda_eval.records import read_records
from CoDALanguageModel import CoDALanguageModel
from CoDALanguageModel.errors import UserError

PROBLEMS = [
    {
        "task_id": f"q/{n}",
        "prompt": "x = 1\n" * n + "Add.",
        "entry_point": "f",
        "test": "pass",
        "canonical_solution": "\n",
    }
    for n in range(6)
]
GAPS = [{"task_id": f"g/{n}", "prefix": "x = ", "middle": "1" * (n + 1), "suffix": "\n"} for n in range(4)]
SETTINGS = {"steps": 6, "max_new_tokens": 6, "temperature": 0.8}
TASKS = "quickstart_problems,quickstart_infill"


class Killed(BaseException):
    """Ends a run where it stands, as a signal would."""


@pytest.fixture
def evaluation(monkeypatch, model_dir, data_dir):
    """Function that runs the command line in this process and gives what it said at its end."""
    monkeypatch.setenv("CODA_EVAL_WORKERS", "1")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip, which takes seconds
    write(data_dir, PROBLEMS, GAPS)

    def call(output, *flags, model=model_dir, tasks=TASKS, batch_size=3, **settings):
        arguments = json.dumps({"pretrained": str(model), **SETTINGS, **settings})
        command = ["coda_eval", "run", "--model", "coda", "--model_args", arguments, "--tasks", tasks]
        command += ["--device", "cpu", "--batch_size", str(batch_size), "--output_path", str(output), *flags]
        return in_process(monkeypatch, command)

    call.judge = lambda output: in_process(monkeypatch, ["coda_eval", "judge", str(output)])
    return call


def in_process(monkeypatch, command):
    monkeypatch.setattr(sys, "argv", command)
    try:
        main()
    except SystemExit as end:
        return str(end)
    return ""


def write(folder, problems, gaps):
    for name, rows in (("problems", problems), ("infill", gaps)):
        (folder / f"quickstart_{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def judged(output):
    """All that a run found out, without times."""
    timeless = {"seconds": None, "cpu_seconds": None, "cost": None}
    return [dataclasses.replace(record, **timeless) for record in read_records(output)]


def scores(output):
    return [(c["task"], c["metric"], c["score"], c["n"], c["bootstrap95"]) for c in cards(output)]


def cards(output):
    return json.loads((output / "scores.json").read_text())


def answer_lines(output):
    lines = [
        json.loads(line) for file in sorted(output.glob("journal_rank*")) for line in file.read_text().splitlines()
    ]
    return [line for line in lines if "answer" in line]


@pytest.fixture
def whole(evaluation, tmp_path):
    """The folder of a run that nothing interrupted."""
    assert evaluation(tmp_path / "whole") == ""
    return tmp_path / "whole"


def test_a_run_killed_at_any_byte_gives_what_an_uninterrupted_one_gives(evaluation, whole, tmp_path, monkeypatch):
    journal = (whole / "journal_rank0.jsonl").read_bytes()
    draw, made = random.Random(0), []
    keep = harness.session.keep
    monkeypatch.setattr(programs, "run_programs", lambda late, **_: [VERDICT] * len(late))
    monkeypatch.setattr(programs.Overlap, "judge", lambda self, document, answer: None)
    for at in [0, *(draw.randrange(1, len(journal)) for _ in range(13)), len(journal)]:
        output = tmp_path / f"cut_{at}"
        output.mkdir()
        (output / "journal_rank0.jsonl").write_bytes(journal[:at])
        assert evaluation(output, "--resume") == ""
        made.append(10 - journal[:at].count(b'"answer": '))
        assert [r.answer for r in judged(output)] == [r.answer for r in judged(whole)]
        assert sorted(line["task_id"] for line in answer_lines(output)) == sorted(r.task_id for r in judged(whole))
    assert len(set(made)) > 5
    for after in draw.sample(range(10), 5):  # of ten answers
        left = [after]

        def killing(answers, left=left):
            if left[0] <= 0:
                raise Killed
            left[0] -= len(answers)
            keep(answers)

        output = tmp_path / f"killed_{after}"
        with monkeypatch.context() as patch:
            patch.setattr(harness.session, "keep", killing)
            with pytest.raises(Killed):
                evaluation(output)
        assert evaluation(output, "--resume") == ""
        assert [r.answer for r in judged(output)] == [r.answer for r in judged(whole)]


VERDICT = programs.Verdict(status="failed", error="", seconds=0.1, isolation="none")


LINE = {"key": "k", "run": "r", "task": "t", "task_id": 1, "slot": "x", "settings": "s", "code": "c", "prompt": "p"}
LINE |= {"answer": "a"} | dict.fromkeys(("seed", "new_tokens", "forwards", "generation_s", "cost"))


def test_a_torn_last_line_is_dropped_and_said_and_a_broken_one_before_it_refused(tmp_path, caplog):
    path = tmp_path / "journal_rank0.jsonl"
    for tail in (b'{"key": "k2", "ru', json.dumps(LINE | {"key": "k2"}).encode(), b"\0" * 100, b"\0\0\n"):
        caplog.clear()
        path.write_bytes(json.dumps(LINE).encode() + b"\n" + tail)
        journal = Journal(tmp_path, resume=True)
        assert set(journal.answers) == {"k"}
        assert "ends in a line that was not written completely" in caplog.text
        journal.write([LINE | {"key": "k3"}], {"s": {}})
        journal.close()
        assert set(Journal(tmp_path, 1, resume=True).answers) == {"k", "k3"}
    path.write_bytes(b"{\n" + json.dumps(LINE).encode() + b"\n")
    with pytest.raises(UserError, match="journal_rank0.jsonl: line 1 is not JSON"):
        Journal(tmp_path, resume=True)
    for strange in (
        b"null",
        b"5",
        b"[]",
        b"{}",
        b'{"resolved": {}}',
        b'{"key": "k", "settings": "s"}',
        b'{"settings": [], "resolved": {}}',
    ):
        path = Path(tempfile.mkdtemp(dir=tmp_path), "journal_rank0.jsonl")
        path.write_bytes(whole := strange + b"\n" + json.dumps(LINE).encode() + b"\n")
        with pytest.raises(UserError, match="journal_rank0.jsonl: line 1 is no line of a journal"):
            Journal(path.parent, resume=True)
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (LINE | {"slot": ["x"]}, r"TypeError: slot: \['x'\]"),
        (LINE | {"answer": None}, "TypeError: answer: None"),
        (LINE | {"new_tokens": "8"}, "TypeError: new_tokens: '8'"),
        ({name: value for name, value in LINE.items() if name != "slot"}, "KeyError: 'slot'"),
        ({name: value for name, value in LINE.items() if name != "answer"}, "KeyError: 'nats'"),
    ],
)
def test_a_line_of_a_journal_that_cannot_be_judged_is_named(tmp_path, line, said):
    (tmp_path / "journal_rank0.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=rf"journal_rank0.jsonl: line 1 is no line of a journal \({said}\)"):
        Journal(tmp_path, resume=True)


def test_a_journal_that_is_a_folder_is_named(tmp_path):
    (tmp_path / "journal_rank0.jsonl").mkdir()
    with pytest.raises(UserError, match="journal_rank0.jsonl cannot be written: .*Is a directory"):
        Journal(tmp_path, resume=True)


def test_a_full_disk_leaves_no_half_of_a_line(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.write([LINE], {"s": {}})
    before, write_some = journal.path.read_bytes(), os.write
    short = iter([True, False])

    def full(file, data):
        if next(short):
            return write_some(file, data[:7])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        journal.write([LINE | {"key": "k2"}], {"s": {}})
    assert journal.path.read_bytes() == before


def test_two_commands_never_write_to_one_journal(tmp_path):
    first = Journal(tmp_path)
    first.write([LINE], {"s": {}})
    with pytest.raises(UserError, match="another command writes to"):
        Journal(tmp_path, resume=True)
    with pytest.raises(UserError, match="another command writes to"):
        Journal(tmp_path).write([{"key": "k", "run": "r"}], {})
    first.close()
    assert Journal(tmp_path, resume=True).found == 1


def test_nothing_meets_an_answer_to_another_question(
    evaluation, whole, tmp_path, data_dir, model_dir, monkeypatch, caplog
):
    monkeypatch.setattr(programs, "run_programs", lambda late, **_: [VERDICT] * len(late))
    monkeypatch.setattr(programs.Overlap, "judge", lambda self, document, answer: None)

    def num_made(*flags, **changes):
        before = len(answer_lines(whole))
        assert evaluation(whole, "--resume", *flags, **changes) == ""
        return len(answer_lines(whole)) - before

    with caplog.at_level("INFO"):
        assert num_made() == 0
    assert f"10 answers are in {whole}" in caplog.text
    assert "10 of these answers were used by this process and 0 not" in caplog.text
    assert num_made(batch_size=1) == 0
    assert num_made("--limit", "2") == 0
    assert num_made(steps=5) == 10
    assert num_made(seed=1) == 10
    assert num_made("--seed", "5") == 10
    assert num_made(dtype="bfloat16") == 10
    assert num_made("--gen_kwargs", "top_p=0.5") == 10
    assert num_made("--gen_kwargs", "temperature=0.1") == 0  # model_args win: what holds is the same
    assert num_made("--apply_chat_template") == 10
    write(data_dir, [PROBLEMS[0] | {"prompt": "Subtract."}, *PROBLEMS[1:]], GAPS)
    programs.problem.__globals__["rows"].cache_clear()
    assert num_made() == 1
    other = tmp_path / "other"
    model = CoDALanguageModel.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    assert num_made(model=other) == 0  # the same model elsewhere
    tokenizer.chat_template = tokenizer.chat_template.replace("user", "User") + " "
    tokenizer.save_pretrained(other)
    assert num_made(model=other) == 10
    tokenizer.chat_template = AutoTokenizer.from_pretrained(model_dir).chat_template
    tokenizer.save_pretrained(other)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    model.save_pretrained(other)
    assert num_made(model=other) == 10
    assert num_made() == 0  # all of this stands side by side
    assert "holds results of an earlier run" in evaluation(whole)


def test_judging_again_needs_no_model_and_gives_the_same(evaluation, whole, monkeypatch):
    before = judged(whole), scores(whole)
    assert {(c["device"], "device" in c["settings"]) for c in cards(whole)} == {("cpu", False)}
    told = {c["task"]: (c["resolved"], c["hashes"], c["seed"], c["dtype"], c["device"]) for c in cards(whole)}
    monkeypatch.setattr(harness.CoDAEvalModel, "__init__", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    (whole / "records.jsonl").unlink()
    assert evaluation.judge(whole) == ""
    assert (judged(whole), scores(whole)) == before
    assert {c["task"]: (c["resolved"], c["hashes"], c["seed"], c["dtype"], c["device"]) for c in cards(whole)} == told


def test_judging_goes_on_after_it_failed_and_takes_the_last_command_of_a_folder(evaluation, tmp_path, monkeypatch):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(programs, "run_programs", lambda *args, **kwargs: 1 // 0)
        assert "quickstart_problems (ZeroDivisionError" in evaluation(output)
    assert {record.task for record in read_records(output)} == {"quickstart_infill"}
    assert evaluation.judge(output) == ""
    assert len(judged(output)) == 10
    first = [record.answer for record in judged(output)]
    assert evaluation(output, "--resume", "--apply_chat_template", steps=2) == ""
    second = judged(output)
    assert [record.answer for record in second] != first
    assert evaluation.judge(output) == ""
    assert judged(output) == second
    assert second[0].prompt.startswith("<|im_start|>user\n")
    assert evaluation(output, "--resume") == ""
    assert evaluation.judge(output) == ""
    assert [record.answer for record in judged(output)] == first


def test_judging_takes_the_answers_of_the_last_run_where_the_same_command_gave_others(evaluation, model_dir, tmp_path):
    """A setting of the checkpoint was changed and changed back; then an older rank's answers stand in a later file."""
    output, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(model_dir, model)
    path = model / "generation_config.json"
    first = json.loads(path.read_text())
    found = []
    for settings in (first, first | {"top_k": 1}, first):
        path.write_text(json.dumps(settings))
        assert evaluation(output, "--resume", model=model, tasks="quickstart_infill") == ""
        found.append([record.answer for record in judged(output)])
        assert evaluation.judge(output) == ""
        assert [record.answer for record in judged(output)] == found[-1]
        if len(found) == 1:
            (output / "journal_rank0.jsonl").rename(output / "journal_rank1.jsonl")
    assert found[0] == found[2] != found[1]


def test_a_killed_resumption_leaves_the_answers_of_its_command_to_be_judged(evaluation, model_dir, tmp_path):
    output, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(model_dir, model)
    assert evaluation(output, model=model, tasks="quickstart_infill") == ""
    before, path = judged(output), model / "generation_config.json"

    def kill(*_):
        raise Killed

    def killed(**settings):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "run_tasks", kill)
            with pytest.raises(Killed):
                evaluation(output, "--resume", model=model, tasks="quickstart_infill", **settings)

    killed(batch_size=1)
    assert evaluation.judge(output) == ""
    assert judged(output) == before
    killed(steps=2)
    assert "4 of 4 answers are not in the journal" in evaluation.judge(output)
    killed()
    assert "4 of 4 answers are not in the journal" in evaluation.judge(output)
    assert evaluation(output, "--resume", model=model, tasks="quickstart_infill") == ""
    assert evaluation.judge(output) == ""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"top_k": 1}))
    killed()
    assert "4 of 4 answers are not in the journal" in evaluation.judge(output)


def with_argument(**given):
    """What makes a command of a command with another argument."""
    return lambda command: command | {"arguments": command["arguments"] | given}


WRONG = {
    "command.json": [
        ("[]", "command.json' must hold a JSON object, got list"),
        ('{"name": 1}', "command.json: name must be a str, got 1"),
        (lambda command: command | {"tasks": [3]}, r"command.json: tasks\[0\] must be a text, got 3"),
        (lambda command: command | {"arguments": {"mode": 1}}, "command.json: arguments has unknown names: mode"),
        (lambda command: command | {"data": ["x"]}, "command.json: data must be a text, got"),
        (with_argument(model=["x"]), r"arguments.model must be str, got \['x'\]"),
        (with_argument(include_path=3), r"arguments.include_path must be list \| None, got 3"),
        (with_argument(include_path=["x", None]), r"arguments.include_path\[1\] must be a text, got None"),
        (with_argument(metadata="x"), r"arguments.metadata must be dict \| None, got 'x'"),
        (with_argument(limit="x"), r"arguments.limit must be float \| int \| None, got 'x'"),
        (with_argument(limit=math.inf), "command.json: --limit must be above 0 .*, got inf"),
        (with_argument(limit=10**400), "command.json: --limit must be above 0 .*, got 1000"),
        (with_argument(seed=3), r"arguments.seed must be list \| None, got 3"),
        (with_argument(samples=-1), r"command.json: --samples must be in \[1, 1000\] .*, got -1"),
        (with_argument(cache_requests=None), r"arguments.cache_requests must be dict, got None"),
        (with_argument(model="x"), "unknown model 'x'"),
    ],
    "hashes.json": [
        ("{", "hashes.json' is not valid JSON: .*; remove it, and the files are hashed again"),
        ("[]", "hashes.json' must hold a JSON object, got list"),
        ('{"x": [1, 2]}', r"hashes.json: 'x' must have \[size, time of change, hash\], got \[1, 2\]"),
    ],
}


def test_files_of_a_run_that_do_not_hold_what_they_should_are_named(evaluation, tmp_path, model_dir):
    output = tmp_path / "run"
    assert evaluation(output, tasks="quickstart_infill") == ""
    command = json.loads((output / "command.json").read_text())
    for text, said in WRONG["command.json"]:
        (output / "command.json").write_text(text if isinstance(text, str) else json.dumps(text(command)))
        assert re.search(said, evaluation.judge(output)), said
    for text, said in WRONG["hashes.json"]:
        (output / "hashes.json").write_text(text)
        with pytest.raises(UserError, match=said):
            hash_weights({"pretrained": model_dir}, output)


def test_judge_and_resume_say_what_is_missing(evaluation, tmp_path, data_dir):
    assert "no command.json in" in evaluation.judge(tmp_path / "nothing")
    output = tmp_path / "run"
    assert evaluation(output, tasks="quickstart_infill") == ""
    said = (output / "command.json").read_bytes()
    (output / "command.json").write_text("{")
    assert "command.json' is not valid JSON" in evaluation.judge(output)
    (output / "command.json").write_bytes(said)
    lines = (output / "journal_rank0.jsonl").read_bytes().splitlines(keepends=True)
    (output / "journal_rank0.jsonl").write_bytes(b"".join(lines[:-1]))
    said = evaluation.judge(output)
    (output / "journal_rank0.jsonl").write_bytes(b"".join(lines[1:]))
    assert "4 of 4 answers in the journal name settings that no line of it holds" in evaluation.judge(output)
    assert "1 of 4 answers are not in the journal, the first to task quickstart_infill, document g/" in said
    command = ["coda_eval", "run", "--model", "coda", "--tasks", "quickstart_infill", "--resume"]
    with pytest.MonkeyPatch.context() as patch:
        assert "--resume needs --output_path" in in_process(patch, command)
        command[3:] = ["dummy", "--tasks", "quickstart_problems", "--resume", "--output_path", str(tmp_path / "dummy")]
        assert "--resume is for coda and hf: the weights of 'dummy' are not known" in in_process(patch, command)


def test_scores_are_the_same_for_batch_sizes_1_7_and_32(evaluation, tmp_path):
    found = []
    for size in (1, 7, 32):
        assert evaluation(tmp_path / str(size), batch_size=size) == ""
        found.append((judged(tmp_path / str(size)), scores(tmp_path / str(size))))
    assert found[0] == found[1] == found[2]


def test_programs_are_judged_while_answers_are_made_and_each_answer_once(evaluation, whole, tmp_path, monkeypatch):
    late, early = [], []
    run_programs, run_one = programs.run_programs, sandbox._run_surely

    def of_filter(asked, **kwargs):
        late.extend(asked)
        return run_programs(asked, **kwargs)

    def counted(program, level, limits):
        early.append(program)
        return run_one(program, level, limits)

    monkeypatch.setattr(programs, "run_programs", of_filter)
    monkeypatch.setattr(sandbox, "_run_surely", counted)
    assert evaluation(tmp_path / "run") == ""
    assert judged(tmp_path / "run") == judged(whole)
    assert late == []
    assert sorted(program.candidate for program in early) == sorted(r.program for r in judged(whole) if r.program)


def test_a_process_that_is_killed_loses_no_answer_that_was_made(model_dir, data_dir, evaluation, tmp_path):
    problems = [row | {"prompt": row["prompt"] * 8} for row in PROBLEMS]
    write(data_dir, problems, GAPS)
    assert evaluation(tmp_path / "whole", tasks="quickstart_problems", batch_size=1) == ""
    output = tmp_path / "killed"
    arguments = json.dumps({"pretrained": model_dir, **SETTINGS})
    command = [sys.executable, "-m", "coda_eval", "run", "--model", "coda", "--model_args", arguments]
    command += ["--tasks", "quickstart_problems", "--device", "cpu", "--batch_size", "1", "--output_path", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal, limit = output / "journal_rank0.jsonl", time.monotonic() + 240
    while not (journal.exists() and b'"answer": ' in journal.read_bytes()):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = journal.read_bytes().count(b'"answer": ')
    assert evaluation(output, "--resume", tasks="quickstart_problems", batch_size=1) == ""
    assert judged(output) == judged(tmp_path / "whole")
    assert len(answer_lines(output)) == 6
    assert made >= 1


CHOICES = """task: own_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def test_likelihoods_are_kept_and_judged_with_their_errors(evaluation, tmp_path, monkeypatch):
    rows = [{"question": "x = " * n, "choices": ["1", "print(x, y, x)"], "answer": n % 2} for n in (1, 2, 3)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = tmp_path / "own.yaml"
    task.write_text(CHOICES.format(rows=tmp_path / "rows.json"))
    # lm-eval's own thousands of files take seconds to index
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    outputs = {count: tmp_path / str(count) for count in (1, 16)}
    for count, output in outputs.items():
        assert evaluation(output, tasks=str(task), mc_num=count) == ""
    records = read_records(outputs[16])
    assert [len(record.likelihoods) for record in records] == [2, 2, 2]
    errors = [error for record in records for _, error in record.likelihoods]
    assert errors[1] > errors[0] == 0.0  # of two tokens all sets are scored
    (card,) = cards(outputs[16])
    assert card["likelihood_stderr"] == {"mean": pytest.approx(sum(errors) / 6), "largest": max(errors), "unknown": 0}
    (unknown,) = cards(outputs[1])
    assert unknown["likelihood_stderr"] == {"mean": None, "largest": None, "unknown": 6}
    assert read_records(outputs[1])[0].likelihoods[1][1] is None
    monkeypatch.setattr(harness, "bound_log_likelihoods", lambda *args, **kwargs: pytest.fail("computed again"))
    assert evaluation(outputs[16], "--resume", tasks=str(task), mc_num=16) == ""
    assert read_records(outputs[16]) == records
    assert evaluation.judge(outputs[16]) == ""
    assert read_records(outputs[16]) == records


def test_an_error_of_a_sum_is_that_of_its_parts_and_unknown_with_one_of_them():
    total = sum([Nats.of(-1.0, 0.3), Nats.of(-2.0, 0.4)])
    assert (total, total.stderr) == (-3.0, pytest.approx(0.5))
    assert sum([Nats.of(-1.0, None), Nats.of(-2.0, 0.4)]).stderr is None
    assert known_likelihood((-1.0, True))["stderr"] == 0.0  # of an autoregressive model


def test_what_lm_eval_gathers_from_other_ranks_keeps_what_it_remembers():
    nats, entry = Nats.of(-1.0, 0.3), programs.Judged.of("a", "program", status="passed")
    again = pickle.loads(pickle.dumps([nats, entry]))
    assert again == [nats, entry]
    assert (again[0].stderr, again[1].program, again[1].fields) == (0.3, "program", {"status": "passed"})


def test_hashes_see_content_and_not_places(model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    first = hash_weights({"pretrained": model_dir}, tmp_path)
    assert first == hash_weights({"pretrained": model_dir}) == hash_weights({"pretrained": model_dir}, tmp_path)
    assert (tmp_path / "hashes.json").exists()
    copy = tmp_path / "copy"
    tokenizer.save_pretrained(copy)
    assert hash_tokenizer(AutoTokenizer.from_pretrained(copy)) == hash_tokenizer(tokenizer)
    tokenizer.add_tokens(["zz"])
    tokenizer.save_pretrained(copy)
    assert hash_tokenizer(AutoTokenizer.from_pretrained(copy)) != hash_tokenizer(
        AutoTokenizer.from_pretrained(model_dir)
    )

    class Sentencepiece:  # the file of one is no text
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer_config.json").write_text("{}")
            (Path(folder) / "tokenizer.model").write_bytes(b"\x80\xff")

    assert hash_tokenizer(Sentencepiece()) == hash_tokenizer(Sentencepiece())
    shutil.copytree(model_dir, tmp_path / "hub")  # as in its cache: files of the same content are links to one
    (tmp_path / "blob").write_bytes(b"")
    for name in ("a.py", "b.py"):
        (tmp_path / "hub" / name).symlink_to(tmp_path / "blob")
    told = {"pretrained": str(tmp_path / "hub"), "trust_remote_code": True}
    both = hash_weights(told)
    (tmp_path / "hub" / "b.py").unlink()
    assert hash_weights(told) != both
    assert code_version()


@pytest.mark.parametrize("fault", [Exception("No space left on device (os error 28)"), OSError(28, "No space left")])
def test_a_tokenizer_that_cannot_be_written_down_is_told_with_the_place(fault):
    class Full:
        def save_pretrained(self, folder):
            raise fault

    with pytest.raises(UserError, match=r"the tokenizer cannot be written to /.*No space left.*TMPDIR names another"):
        hash_tokenizer(Full())
    fault = KeyError("a bug")
    with pytest.raises(KeyError, match="a bug"):
        hash_tokenizer(Full())
