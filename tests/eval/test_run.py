"""What can be known is checked before the model loads; a task that fails stops no other; no two runs share a folder."""

import collections
import dataclasses
import functools
import itertools
import json
import math
import re
import sys

import pytest
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex

from coda_eval import programs, run
from coda_eval.__main__ import TASKS, main
from coda_eval.harness import CoDAEvalModel
from coda_eval.judge import judge
from coda_eval.records import Record, read_records
from coda_eval.report import score_cards
from CoDALanguageModel.errors import UserError

ROW = {
    "task_id": "q/0",
    "prompt": "Add.",
    "entry_point": "add",
    "test": "assert add(1, 2) == 3",
    "canonical_solution": "def add(a, b):\n    return a + b\n",
}
GAP = {"task_id": "g/0", "prefix": "x = ", "middle": "1", "suffix": "\n"}


@register_model("counting_stub")
class CountingStub(LM):
    """Counts how often it is built and asked; answers with the solution; fails on demand."""

    built, asked, fails_on = 0, 0, ""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        type(self).built += 1

    def generate_until(self, requests, disable_tqdm=False):
        """The solutions of the requests' documents."""
        type(self).asked += len(requests)
        if requests[0].task_name == self.fails_on:
            raise RuntimeError("out of memory")
        return [request.doc["canonical_solution"] for request in requests]

    def loglikelihood(self, requests):
        """Not used."""
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.fixture
def stub(monkeypatch):
    """The class of the counting model, at zero."""
    for name, value in (("built", 0), ("asked", 0), ("fails_on", "")):
        monkeypatch.setattr(CountingStub, name, value)
    return CountingStub


@pytest.fixture
def evaluation(monkeypatch, data_dir, tmp_path_factory):
    """Function that runs the command line in this process and gives what it said at its end."""
    monkeypatch.setenv("CODA_EVAL_WORKERS", "1")
    output = tmp_path_factory.mktemp("output")

    def call(*arguments, model="counting_stub", tasks="quickstart_problems", output=str(output)):
        command = ["coda_eval", "run", "--model", model, "--tasks", *tasks.split()]
        command += ["--output_path", output] if output else []
        monkeypatch.setattr(sys, "argv", [*command, *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return str(end)
        return ""

    call.output = output
    return call


def write_rows(folder, *rows, name="quickstart_problems.jsonl"):
    (folder / name).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


def answers_in(journal):
    return [row for row in map(json.loads, journal.read_text().splitlines()) if "answer" in row]


def results_of(folder):
    found = {}
    for path in sorted(folder.rglob("results_*.json")):
        found |= json.loads(path.read_text())["results"]
    return found


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{key: value for key, value in ROW.items() if key != "test"}], "line 1 lacks test"),
        ([ROW, {**ROW, "task_id": "q/1", "timeout_s": None}], "line 2 has a wrong timeout_s: .* got None"),
        ([{**ROW, "timeout_s": "30"}], "line 1 has a wrong timeout_s: .* got '30'"),
        ([{**ROW, "timeout_s": 0}], "line 1 has a wrong timeout_s: .* got 0"),
        ([ROW, {**ROW, "task_id": 1}], "line 2 has a task_id of another kind than line 1"),
        (["[", json.dumps(ROW), "]"], "line 1 of .* is not JSON"),
        ([json.dumps([ROW])], "line 1 must be a JSON object"),
    ],
)
def test_bad_problem_rows_are_refused_before_the_model_is_loaded(evaluation, stub, data_dir, rows, message):
    write_rows(data_dir, *rows)
    said = evaluation()
    assert said.startswith("coda_eval: error: 1 of 1 tasks cannot be run: quickstart_problems: ")
    assert "quickstart_problems.jsonl" in said
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)
    assert stub.built == 0


def test_a_command_without_a_task_is_refused(evaluation, stub, data_dir):
    assert "--tasks names no task" in evaluation(tasks=",")
    assert stub.built == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tasks": "quickstart_problem"}, "unknown task 'quickstart_problem'; did you mean 'quickstart_problems'?"),
        ({"tasks": "quickstart_problems,nope_x,nope_y"}, "unknown tasks 'nope_x', 'nope_y' (`ls tasks` lists them)"),
        ({"model": "counting_stab"}, "unknown model 'counting_stab'; did you mean 'counting_stub'?"),
    ],
)
def test_unknown_names_are_refused_at_once(evaluation, stub, data_dir, monkeypatch, given, said):
    write_rows(data_dir, ROW)
    monkeypatch.setattr(TaskIndex, "build", functools.partial(no_index, TaskIndex.build))
    assert said in evaluation(**given)
    assert stub.built == 0


def test_a_folder_for_results_without_a_name_is_refused(evaluation, stub, data_dir):
    write_rows(data_dir, ROW)
    assert "--output_path must name a folder, got ''" in evaluation("--output_path", "", output="")
    assert stub.built == 0


def test_arguments_that_no_file_could_hold_are_refused(evaluation, stub, data_dir):
    write_rows(data_dir, ROW)
    assert r"arguments must be UTF-8, got '" in evaluation("--system_instruction", "caf\udce9")
    assert stub.built == 0


def no_index(build, paths, **options):
    """Reads the tasks of folders, and not the thousands of lm-eval's own."""
    assert all(path == TASKS for path in paths)
    return build(paths, **options)


def test_a_task_that_lm_eval_alone_finds_missing_is_refused(evaluation, stub, data_dir, monkeypatch):
    def process(self, metadata):
        raise ValueError("Tasks not found: hellaswag_x")

    monkeypatch.setattr(run, "refuse_unknown_tasks", lambda names, ours: None)
    monkeypatch.setattr(run.EvaluatorConfig, "process_tasks", process)
    assert evaluation(tasks="hellaswag_x").startswith("coda_eval: error: --tasks: Tasks not found: hellaswag_x (`ls")


def test_names_of_lm_evals_tasks_are_left_to_it():
    names = ["mmlu_abstract_algebra", "mmlu_*", "acp_bench", str(TASKS), "own.yaml"]  # acp_bench: in an included file
    run.refuse_unknown_tasks(names, [])


def test_what_is_installed_is_asked_once(evaluation, stub, data_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "add_env_info", lambda found: asked.append(1) or found.update(lm_eval_version="x"))
    run._environment.cache_clear()
    write_rows(data_dir, ROW)
    row = ROW | {"test": "def check(f):\n    assert f(1, 2) == 3"}
    write_rows(data_dir, row, name="HumanEval.jsonl")
    assert evaluation(tasks="quickstart_problems,coda_humaneval_instruct") == ""
    assert {card["versions"]["lm_eval_version"] for card in score_cards(evaluation.output)} == {"x"}
    assert len(asked) == 1
    run._environment.cache_clear()


@pytest.mark.parametrize("limit", ["0", "-3", "nan", "inf", "1e+30"])
def test_a_limit_that_leaves_nothing_is_refused_before_the_model_is_loaded(evaluation, stub, data_dir, limit):
    assert f"--limit must be above 0 (documents, or below 1 a share of them), got {limit}" in evaluation(
        "--limit", limit
    )
    assert stub.built == 0


def test_every_task_that_cannot_be_run_is_named_before_the_model_is_loaded(evaluation, stub, data_dir):
    write_rows(data_dir, {**ROW, "timeout_s": -1})
    said = evaluation("--model_args", "x=1", tasks="quickstart_problems quickstart_infill coda_humaneval")
    assert "2 of 3 tasks cannot be run: quickstart_problems: " in said
    assert "; quickstart_infill: quickstart_infill needs the file quickstart_infill.jsonl: not found" in said
    assert stub.built == 0


def test_the_sandbox_is_tried_before_the_model_is_loaded(evaluation, stub, data_dir, monkeypatch):
    write_rows(data_dir, ROW)

    def missing(level):
        raise UserError(f"sandbox level {level!r} does not work on this machine: bwrap: No permissions")

    with monkeypatch.context() as patch:
        patch.setattr(programs, "isolation_level", missing)
        said = evaluation()
    assert "'auto' does not work on this machine: bwrap: No permissions (CODA_EVAL_SANDBOX sets the level)" in said
    with monkeypatch.context() as patch:
        patch.setenv("CODA_EVAL_PACKAGES", "pandsa")
        said = evaluation()
    assert "CODA_EVAL_PACKAGES names pandsa: not installed here" in said
    assert "CODA_EVAL_SANDBOX" not in said
    monkeypatch.setenv("CODA_EVAL_WORKERS", "many")
    assert "CODA_EVAL_WORKERS must be a positive number, got 'many'" in evaluation()
    assert stub.built == 0


def test_gaps_need_no_sandbox_but_a_model_that_fills_them(evaluation, stub, data_dir, monkeypatch):
    write_rows(data_dir, GAP, name="quickstart_infill.jsonl")
    monkeypatch.setenv("CODA_EVAL_SANDBOX", "none")
    said = evaluation(tasks="quickstart_infill")
    assert "the model 'counting_stub' would see the text before a gap only; coda and hf fill gaps" in said
    assert stub.built == 0


@pytest.mark.parametrize(
    ("flags", "file", "message"),
    [
        (["--use_cache", "answers"], "", "--use_cache is refused: .* number of steps would get the old answers"),
        ([], "use_cache: answers", "--use_cache is refused"),
        (["--cache_requests", "true"], "", "--cache_requests is refused: .*gen_kwargs, gap lengths"),
        ([], "cache_requests: true", "--cache_requests is refused"),
    ],
)
def test_caches_that_lie_are_refused(evaluation, stub, data_dir, tmp_path, flags, file, message):
    write_rows(data_dir, ROW)
    config = tmp_path / "run.yaml"
    config.write_text(f"include_path: []\n{file}\n")
    said = evaluation("--config", config, *flags)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)
    assert stub.built == 0
    assert list(tmp_path.glob("answers*")) == []


def test_a_task_that_fails_stops_no_other_and_is_named_at_the_end(evaluation, stub, data_dir, monkeypatch):
    write_rows(data_dir, ROW)
    monkeypatch.setattr(stub, "fails_on", "quickstart_problems")
    said = evaluation("--limit", "2", "--log_samples", tasks="quickstart_problems coda_humaneval")
    assert said.startswith("coda_eval: error: 1 of 2 tasks failed: quickstart_problems (RuntimeError: out of memory)")
    results = results_of(evaluation.output)
    assert list(results) == ["coda_humaneval"]
    assert results["coda_humaneval"]["pass@1,run"] == 1.0
    assert results["coda_humaneval"]["outcomes,run"] == "2 programs: 0 failed, 2 passed, 0 timeout"
    (card,) = json.loads((evaluation.output / "scores.json").read_text())
    assert (card["task"], card["score"], card["isolation"] != "") == ("coda_humaneval", 1.0, True)
    assert stub.built == 1


def test_a_failure_to_judge_loses_no_answer(evaluation, stub, data_dir, monkeypatch):
    write_rows(data_dir, ROW)

    def broken(*args, **kwargs):
        raise RecursionError("too deep")

    monkeypatch.setattr(programs, "run_programs", broken)
    said = evaluation("--limit", "2", tasks="quickstart_problems coda_humaneval")
    assert "2 of 2 tasks failed: quickstart_problems (RecursionError: too deep)" in said
    (file,) = evaluation.output.glob("journal_rank0.jsonl")
    assert f"3 answers are kept in {file}" in said
    answers = answers_in(file)
    assert [(answer["task"], answer["task_id"]) for answer in answers] == [
        ("quickstart_problems", "q/0"),
        ("coda_humaneval", "HumanEval/0"),
        ("coda_humaneval", "HumanEval/1"),
    ]
    assert answers[0]["answer"] == ROW["canonical_solution"]


def test_without_a_folder_for_results_a_failure_names_where_the_answers_are(
    evaluation, stub, data_dir, tmp_path, monkeypatch
):
    write_rows(data_dir, ROW)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    assert evaluation(output="") == ""
    assert list(scratch.iterdir()) == []
    monkeypatch.setattr(stub, "fails_on", "quickstart_problems")
    assert "1 of 1 tasks failed" in evaluation(output="")
    assert list(scratch.iterdir()) == []
    monkeypatch.setattr(stub, "fails_on", "")
    monkeypatch.setattr(programs, "run_programs", lambda *args, **kwargs: 1 // 0)
    said = evaluation(output="")
    (folder,) = scratch.iterdir()
    assert f"1 answers are kept in {folder}/journal_rank0.jsonl" in said
    assert answers_in(folder / "journal_rank0.jsonl")[0]["answer"] == ROW["canonical_solution"]


def test_files_and_patterns_of_tasks_run_each_by_itself(evaluation, stub, data_dir, tmp_path, monkeypatch):
    write_rows(data_dir, ROW)
    # lm-eval's own thousands of files take seconds to index
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    (tmp_path / "own.yaml").write_text(f"include: {TASKS / 'quickstart_problems.yaml'}\ntask: own_problems\n")
    results = tmp_path / "named.json"
    said = evaluation(tasks=f"{tmp_path / 'own.yaml'} quickstart_prob*", output=str(results))
    assert said == ""
    found = [json.loads(path.read_text())["results"] for path in sorted(tmp_path.glob("named_*.json"))]
    assert [list(result) for result in found] == [["own_problems"], ["quickstart_problems"]]
    assert stub.built == 1
    assert "holds results of an earlier run" in evaluation(output=str(results))
    assert stub.built == 1


def test_a_second_run_never_mixes_with_the_first(evaluation, stub, data_dir):
    write_rows(data_dir, ROW)
    assert evaluation() == ""
    first = {path: path.read_bytes() for path in evaluation.output.rglob("*.*")}
    assert len(first) == 5  # results, answers, command, records and score cards
    assert "holds results of an earlier run" in evaluation()
    assert stub.built == 1
    assert {path: path.read_bytes() for path in evaluation.output.rglob("*.*")} == first
    (results,) = evaluation.output.rglob("results_*.json")
    results.unlink()
    assert "journal_rank0.jsonl), which could not be told from the new ones" in evaluation()
    assert stub.built == 1


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(evaluation, stub, data_dir, tmp_path):
    write_rows(data_dir, ROW)
    (tmp_path / "file").write_text("")
    assert "nothing can be written to --output_path" in evaluation(output=str(tmp_path / "file" / "below"))
    assert stub.built == 0


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("save_results_aggregated", "OSError: lm-eval could not write the results to"),
        ("save_results_samples", "OSError: lm-eval could not write all samples of quickstart_problems to"),
    ],
)
def test_results_that_lm_eval_could_not_write_fail_the_task(evaluation, stub, data_dir, monkeypatch, method, message):
    write_rows(data_dir, ROW)
    monkeypatch.setattr(EvaluationTracker, method, lambda *args, **kwargs: None)
    assert message in evaluation("--log_samples")


def test_the_diffusion_model_writes_its_answers_as_it_makes_them(evaluation, model_dir, data_dir, caplog):
    write_rows(data_dir, ROW, {**ROW, "task_id": "q/1"})
    write_rows(data_dir, GAP, name="quickstart_infill.jsonl")
    settings = json.dumps({"pretrained": model_dir, "steps": 4, "max_new_tokens": 4})
    said = evaluation(
        *("--model_args", settings, "--device", "cpu", "--batch_size", "1", "--log_samples"),
        model="coda",
        tasks="quickstart_problems,quickstart_infill",
    )
    assert said == ""
    answers = answers_in(evaluation.output / "journal_rank0.jsonl")
    assert [answer["task_id"] for answer in answers] == ["q/0", "q/1", "g/0"]
    assert all(answer["forwards"] >= 1 and answer["generation_s"] > 0 for answer in answers)
    assert set(results_of(evaluation.output)) == {"quickstart_problems", "quickstart_infill"}
    records = read_records(evaluation.output)
    assert [(r.task, r.task_id, r.repeat) for r in records] == [
        ("quickstart_problems", "q/0", 0),
        ("quickstart_problems", "q/1", 0),
        ("quickstart_infill", "g/0", 0),
    ]
    assert [r.answer for r in records] == [answer["answer"] for answer in answers]
    assert all(r.score == 0.0 and r.status == "failed" and r.seed >= 0 and r.cost["generation_s"] > 0 for r in records)
    assert [r.finish_reason for r in records] == ["length", "length", None]
    assert records[0].program == records[0].answer
    assert records[0].cpu_seconds is not None
    assert records[2].program is None
    cards = json.loads((evaluation.output / "scores.json").read_text())
    assert [(card["task"], card["metric"], card["n"]) for card in cards] == [
        ("quickstart_problems", "pass@1", 2),
        ("quickstart_infill", "exact_match", 1),
        ("quickstart_infill", "exact_match_raw", 1),
    ]
    assert [card["cut"] for card in cards] == [2, None, None]
    assert "quickstart_problems: 2 of 2 answers are as long as they could be" in caplog.text
    assert cards == score_cards(evaluation.output)


def test_records_with_an_unknown_or_a_missing_field_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no records.jsonl in"):
        read_records(tmp_path)
    fields = {field.name: None for field in dataclasses.fields(Record)} | {"task": "t", "doc_id": 0, "repeat": 0}
    for rows, message in (
        ([fields, fields | {"scores": 1}], r"records.jsonl: line 2 has an unknown field 'scores'.*score"),
        ([{name: None for name in fields if name != "seed"}], "line 1 lacks seed"),
        ([[]], "line 1 must be a JSON object"),
    ):
        (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(UserError, match=message):
            read_records(tmp_path)
    (tmp_path / "records.jsonl").write_text(json.dumps(fields)[:-3])
    with pytest.raises(UserError, match="line 1 is not JSON"):
        read_records(tmp_path)
    (tmp_path / "records.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        read_records(tmp_path)
    for strange, message in (
        ({"score": "1"}, "line 1: score must be a number or null, got '1'"),
        ({"cost": [1]}, "line 1: cost must be an object of finite numbers or null, got"),
        ({"status": 3}, "line 1: status must be a text or null, got 3"),
    ):
        (tmp_path / "records.jsonl").write_text(json.dumps(fields | strange))
        with pytest.raises(UserError, match=message):
            read_records(tmp_path)


def test_an_id_that_is_no_text_and_no_number_is_not_the_documents_name():
    answer = {"filter": "none", "arguments": [("p",)], "metrics": ["acc"], "acc": 1.0, "resps": [["x"]]}
    answer |= {"filtered_resps": ["x"]}
    samples = [answer | {"doc_id": n, "doc": {"task_id": own}} for n, own in enumerate(("q", 7, ["a"], None))]
    assert [record.task_id for record in run.records_of("t", samples)] == ["q", 7, 2, 3]


def test_samples_is_the_number_of_answers_to_each_problem(evaluation, stub, data_dir, monkeypatch):
    """pass@1 and pass@10 are those of all choices of 1 and of 10 among the answers; with --limit, too."""
    write_rows(data_dir, *({**ROW, "task_id": f"q/{n}"} for n in range(3)))
    right = {"q/0": range(10), "q/1": [3, 7]}

    def generate(self, requests, disable_tqdm=False):
        made = collections.Counter()
        answers = []
        for request in requests:
            name = request.doc["task_id"]
            answers.append(ROW["canonical_solution"] if made[name] in right.get(name, ()) else "")
            made[name] += 1
        return answers

    monkeypatch.setattr(stub, "generate_until", generate)
    assert evaluation("--samples", 12, "--limit", 3, "--gen_kwargs", "do_sample=True,temperature=0.8") == ""
    results = results_of(evaluation.output)["quickstart_problems"]
    for k in (1, 10, 12):
        found = [
            sum(any(n in right.get(name, ()) for n in c) for c in itertools.combinations(range(12), k))
            for name in ("q/0", "q/1", "q/2")
        ]
        assert results[f"pass@{k},run"] == pytest.approx(sum(found) / 3 / math.comb(12, k))
    assert "pass@100,run" not in results
    for path in evaluation.output.rglob("results_*.json"):
        path.unlink()
    judge(evaluation.output)  # which asks for as many answers
    again = results_of(evaluation.output)["quickstart_problems"]
    assert {k: v for k, v in again.items() if "pass@" in k} == {k: v for k, v in results.items() if "pass@" in k}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--samples", "0"), r"--samples must be in \[1, 1000\] \(answers to each problem\), got 0"),
        (("--samples", "-3"), r"--samples must be in \[1, 1000\].*got -3"),
        (("--samples", "10"), "--samples with temperature 0 would give quickstart_problems the same answer each time"),
        (("--samples", "2", "--gen_kwargs", "do_sample=False,temperature=0.5"), "--samples with temperature 0"),
    ],
)
def test_a_number_of_answers_that_means_nothing_is_refused(evaluation, stub, data_dir, flags, message):
    write_rows(data_dir, ROW)
    assert re.search(message, evaluation(*flags))
    assert stub.asked == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "Config file not found: "),
        ("[1]", "YAML root must be a mapping in "),
        ("{", "config.yaml' cannot be read: "),
        ("mode: x", "unexpected keyword argument 'mode'"),
    ],
)
def test_a_config_file_that_is_none_is_named(evaluation, stub, data_dir, tmp_path, text, said):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    assert said in evaluation("--config", str(tmp_path / "config.yaml"))
    assert stub.built == 0


def test_a_config_file_may_ask_for_the_number_of_answers(evaluation, stub, data_dir, tmp_path):
    write_rows(data_dir, ROW)
    (tmp_path / "run.yaml").write_text("samples: 3\n")
    assert "--samples with temperature 0" in evaluation("--config", tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("samples: 3\ngen_kwargs: {do_sample: true, temperature: 0.7}\n")
    assert evaluation("--config", tmp_path / "run.yaml") == ""
    assert [record.repeat for record in read_records(evaluation.output)] == [0, 1, 2]


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_a_length_of_the_command_holds_whatever_the_task_calls_its_own(evaluation, stub, data_dir, monkeypatch, name):
    write_rows(data_dir, ROW)
    asked = []

    def generate(self, requests, disable_tqdm=False):
        asked.extend(request.args[1] for request in requests)
        return [""] * len(requests)

    monkeypatch.setattr(stub, "generate_until", generate)
    assert evaluation("--gen_kwargs", f"{name}=5") == ""
    assert [{key: value for key, value in given.items() if "max" in key} for given in asked] == [{"max_gen_toks": 5}]
    told = "--gen_kwargs: max_gen_toks and max_tokens are the same setting, got 4, 5"
    assert told in evaluation("--gen_kwargs", "max_gen_toks=4,max_tokens=5")


def test_samples_of_problems_is_still_lm_evals(evaluation, stub, data_dir):
    write_rows(data_dir, *({**ROW, "task_id": f"q/{n}"} for n in range(3)))
    assert evaluation("--samples", '{"quickstart_problems": [2]}', "--log_samples") == ""
    assert [record.task_id for record in read_records(evaluation.output)] == ["q/2"]


def test_the_diffusion_model_draws_by_whatever_sets_its_temperature(model_dir):
    for settings, given, draws in (
        ({}, {}, False),
        ({"temperature": 0.5}, {}, True),
        ({}, {"temperature": 0.5}, True),
        ({"temperature": 0.0}, {"temperature": 0.5}, False),
        ({}, {"temperature": 0.5, "do_sample": False}, False),
    ):
        model = CoDAEvalModel(model_dir, device="cpu", **settings)
        assert model.draws({"until": [], "max_gen_toks": 4, **given}) is draws


def test_every_rank_makes_the_folder_that_it_writes_to(tmp_path, monkeypatch):
    """In a sweep, ranks come to the next point's folder at no agreed time."""
    monkeypatch.setenv("RANK", "1")
    assert run.claim_folder(str(tmp_path / "sweep" / "point"), resume=True).is_dir()
