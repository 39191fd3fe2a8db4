"""Problems come from the named place, and a missing or broken file is named."""

import base64
import gzip
import json
import pickle
import zlib

import pytest

from coda_eval import data, programs
from coda_eval.data import SAFIM_WORDS, documents, problem

ROW = {"task_id": "a/0", "prefix": "p", "middle": "m", "suffix": "s"}


def test_humaneval_comes_with_the_package_and_hides_its_tests(monkeypatch):
    monkeypatch.delenv("CODA_EVAL_DATA", raising=False)
    split = documents("humaneval")["test"]
    assert len(split) == 164
    assert "test" not in split.column_names
    assert "def check(candidate)" in problem(split[3])["test"]


def test_files_are_found_plain_gzipped_and_one_level_below(tmp_path):
    for place in ("quickstart_infill.jsonl", "x/quickstart_infill.jsonl", "quickstart_infill.jsonl.gz"):
        folder = tmp_path / place.replace("/", "_")
        path = folder / place
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(json.dumps(ROW).encode()) if place.endswith("gz") else json.dumps(ROW).encode())
        (row,) = documents("quickstart_infill", data_dir=str(folder))["test"]
        assert (row["infill_prefix"], row["infill_middle"], row["infill_suffix"]) == ("p", "m", "s")
        assert row["infill_tokens"] == 0
        assert problem(row)["middle"] == "m"


def test_fixed_gap_length_reaches_the_document(tmp_path):
    (tmp_path / "quickstart_infill.jsonl").write_text(json.dumps(ROW))
    assert documents("quickstart_infill", data_dir=str(tmp_path), gap_length=7)["test"][0]["infill_tokens"] == 7
    for given, tried in (("unknown", [4, 8, 16, 32, 64]), ([3, 5, 3], [3, 5])):
        row = documents("quickstart_infill", data_dir=str(tmp_path), gap_length=given)["test"][0]
        assert (row["infill_lengths"], row["infill_tokens"]) == (tried, 0)
    for wrong in (0, -1, "long", 2.5, True, [], [1, "2"], [0], list(range(1, 18))):
        with pytest.raises(ValueError, match="gap_length must be 'true' or a positive number of tokens"):
            documents("quickstart_infill", data_dir=str(tmp_path), gap_length=wrong)


def test_mbpp_keeps_the_published_splits(tmp_path):
    rows = [{"task_id": i, "text": "t", "code": "c", "test_list": ["assert True"] * 3} for i in range(1, 601)]
    (tmp_path / "mbpp.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = documents("mbpp", data_dir=str(tmp_path))
    assert splits["test"]["task_id"] == list(range(11, 511))
    assert splits["examples"]["task_id"] == [2, 3, 4]


def test_missing_file_is_an_error_that_names_it_and_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"needs the file quickstart_problems.jsonl: not found in .*CODA_EVAL_DATA"):
        documents("quickstart_problems", data_dir=str(tmp_path))

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(data.datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"mbpp: no mbpp.jsonl .*google-research-datasets/mbpp.*no network.*CODA_EVAL_DATA"
    ):
        documents("mbpp", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="benchmark folder .*nowhere.* does not exist"):
        documents("mbpp", data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="unknown benchmark 'humanevil'"):
        documents("humanevil")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"task_id": "a"}', "1 of 1 rows cannot be used: line 1 lacks middle, prefix, suffix"),
        ("not json", "line 1 of .*infill.jsonl is not JSON"),
        ("[\n" + json.dumps(ROW) + "\n]", "line 1 of .*infill.jsonl is not JSON.*one JSON object a line"),
        (json.dumps([ROW]), "line 1 must be a JSON object, got"),
        ("[" * 100_000, "line 1 of .*infill.jsonl is not JSON"),
        ("", "has no rows"),
        (json.dumps(ROW) + "\n\n" + json.dumps(ROW), "line 3 has the task_id of line 1, 'a/0'"),
        (
            json.dumps(ROW) + "\n" + json.dumps({**ROW, "task_id": 7}),
            "line 2 has a task_id of another kind than line 1",
        ),
        (json.dumps(ROW).encode("utf-16"), "infill.jsonl cannot be read after line 0: UnicodeDecodeError"),
    ],
)
def test_broken_file_is_an_error_that_names_it(tmp_path, text, message):
    (tmp_path / "quickstart_infill.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        documents("quickstart_infill", data_dir=str(tmp_path))


def test_cut_archive_is_an_error_that_names_it(tmp_path):
    rows = "\n".join(json.dumps({**ROW, "task_id": str(n), "prefix": str(n * 7919)}) for n in range(3000))
    (tmp_path / "quickstart_infill.jsonl.gz").write_bytes(gzip.compress(rows.encode())[:-100])
    with pytest.raises(ValueError, match="infill.jsonl.gz cannot be read after line [0-9]+: EOFError"):
        documents("quickstart_infill", data_dir=str(tmp_path))


def test_byte_order_mark_loses_no_row(tmp_path):
    (tmp_path / "quickstart_infill.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode())
    assert documents("quickstart_infill", data_dir=str(tmp_path))["test"]["task_id"] == ["a/0"]


GOOD = {
    "task_id": "x/1",
    "prompt": "def f():\n",
    "entry_point": "f",
    "canonical_solution": "    return 1\n",
    "test": "def check(f):\n    assert f() == 1\n",
    "suffix": "",
    "prefix": "p",
    "middle": "m",
    "text": "t",
    "code": "c",
    "test_list": ["assert True"],
    "name": "x",
    "id": "x",
    "question_id": "x",
    "language": "py",
    "lang": "python",
    "input": "1",
    "output": "[1]",
    "question_content": "q",
    "starter_code": "",
    "public_test_cases": json.dumps([{"input": "1", "output": "2", "testtype": "stdin"}]),
    "private_test_cases": base64.b64encode(
        zlib.compress(pickle.dumps(json.dumps([{"input": "1", "output": "2", "testtype": "stdin"}])))
    ).decode(),
    "metadata": "{}",
    "complete_prompt": "def f():\n",
    "instruct_prompt": "Write f.",
    "code_prompt": "def f():\n",
    "eval_prompt": "{{completion}}",
    "ground_truth": "m",
    "unit_tests": [{"input": "1", "output": ["2"]}],
    "to_remove": "x\n",
}
"""A row that every benchmark but MBPP, whose ids are numbers, accepts."""

LATE = {
    "test": [None, 3, " ", "# later", "def check(:", "x = '\x00'", "assert '\ud800'"],
    "test_list": [None, [], [""], "assert True", [1], ["assert ("], ["assert '\udfff'"]],
    "test_imports": ["import math", [1]],
    "test_setup_code": [3, "import ("],
    "timeout_s": [None, "30", 0, -1, True, float("inf"), float("nan"), 1e9, 10**400],
    "suffix": [None, 1, "\udc00"],
    "entry_point": [None, "", "f()", "lambda", 1],
    "task_id": [None, "", True, 1.5, ["a"], "\ud800", 1 << 63],
    "prompt": [None, 5, ["a"], "\ud800"],
    "canonical_solution": [None, 5],
    "prefix": [None],
    "middle": [None, 3],
    "text": [None],
    "code": [None, {}],
    **{
        name: [None, 3, "\ud800"]
        for name in (
            *("name", "id", "question_id", "language", "lang", "question_content", "starter_code", "instruct_prompt"),
            *("complete_prompt", "code_prompt", "eval_prompt", "ground_truth", "to_remove"),
        )
    },
    "input": [None, 3, "1 +"],
    "output": [None, "(", "\ud800"],
    "public_test_cases": [None, [], "[{}]", '[{"input": "", "output": 1, "testtype": "stdin"}]', "x", "bm8=", "{}"],
    "private_test_cases": [
        *(None, "x", "[1]", "AAAA"),
        base64.b64encode(zlib.compress(pickle.dumps(print))).decode(),
        base64.b64encode(zlib.compress(pickle.dumps("[" * 3))).decode(),
    ],
    "metadata": [None, "x", "[]", '{"func_name": 3}'],
    "unit_tests": [None, "x", "{}", [], "[]", [{}], [{"input": "a", "output": "b"}], '[{"input": 1, "output": []}]'],
}
"""Values of each field that nothing may be asked with, or that would fail when the answer is judged."""


@pytest.mark.parametrize("name", sorted(data.SOURCES))
def test_every_field_that_is_read_later_is_checked_on_load(tmp_path, name):
    source = data.SOURCES[name]
    number = {"task_id": 11} if source.splits else {}
    if name.startswith("safim"):
        number = {"prompt": f"# {SAFIM_WORDS}"}
    if name.startswith("bigcodebench"):
        number = {"test": "class TestCases: pass"}
    file = source.files[0]

    def load(row, label):
        folder = tmp_path / label
        folder.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(row))
        return documents(name, data_dir=str(folder))

    whole = {**GOOD, **number}
    if source.examples:
        (tmp_path / "good").mkdir()
        (tmp_path / "good" / "mbpp.jsonl").write_text("\n".join(json.dumps({**whole, "task_id": n}) for n in (2, 11)))
    assert len(load(whole, "good")["test"]) == 1
    for field in source.fields:
        with pytest.raises(ValueError, match=f"{file}: 1 of 1 rows cannot be used: line 1 lacks {field}$"):
            load({key: value for key, value in whole.items() if key != field}, f"no_{field}")
    for field in (*source.fields, *source.may_have):
        for index, value in enumerate(LATE[field]):
            with pytest.raises(ValueError, match=f"{file}: .* line 1 has a wrong {field}: it must be "):
                load({**whole, field: value}, f"{field}_{index}")


@pytest.mark.parametrize("name", [n for n in data.SOURCES if n.startswith("humaneval") or n.endswith("_infilling")])
def test_what_is_called_to_judge_is_defined(tmp_path, name):
    (tmp_path / data.SOURCES[name].files[0]).write_text(json.dumps({**GOOD, "test": "assert f() == 1"}))
    with pytest.raises(ValueError, match="line 1 has a wrong test: it must define check.candidate."):
        documents(name, data_dir=str(tmp_path))


def test_fields_that_programs_read_are_fields_that_are_checked():
    builders = {
        "humaneval": programs.humaneval_program,
        "humaneval_plus": programs.humaneval_program,
        "mbpp": programs.mbpp_program,
        "mbpp_plus": programs.mbpp_plus_program,
        "quickstart_problems": programs.quickstart_program,
        **{name: programs.infilling_program for name in data.SOURCES if name.endswith("_infilling")},
    }
    builders = programs.PROGRAMS | builders
    for name, build in builders.items():
        read = set()

        class Row(dict):
            def __getitem__(self, key, read=read):
                read.add(key)
                return super().__getitem__(key)

            def get(self, key, default=None, read=read):
                read.add(key)
                return super().get(key, default)

        build(Row({**GOOD, "timeout_s": 1.0}), "answer")
        source = data.SOURCES[name]
        assert read <= {*source.fields, *source.may_have}, name


def test_mbpp_without_a_problem_of_its_test_split_is_an_error(tmp_path):
    (tmp_path / "mbpp.jsonl").write_text(json.dumps({**GOOD, "task_id": 3}))
    with pytest.raises(ValueError, match="mbpp has no problem of its test split"):
        documents("mbpp", data_dir=str(tmp_path))


def test_data_dir_that_was_read_as_a_number_is_an_error():
    with pytest.raises(ValueError, match="data_dir must be the path of a folder, got 40000"):
        documents("humaneval", data_dir=40000)


def test_gaps_of_lines_get_the_line_breaks_that_no_field_holds(tmp_path):
    row = {**GOOD, "prompt": "a", "canonical_solution": "  b", "suffix": "c"}
    rows = [{**row, "language": "py"}, {**row, "language": "js", "suffix": "\n"}, {**row, "name": "y", "suffix": ""}]
    (tmp_path / "santacoder_fim.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = list(documents("santacoder_fim", data_dir=str(tmp_path))["test"])
    gaps = [(r["task_id"], r["infill_prefix"], r["infill_middle"], r["infill_suffix"]) for r in found]
    assert gaps == [("py/x", "a\n", "  b", "\nc"), ("js/x", "a\n", "  b", "\n"), ("py/y", "a\n", "  b", "\n")]
    assert len(documents("santacoder_fim", data_dir=str(tmp_path), language="js")["test"]) == 1
    with pytest.raises(ValueError, match="language must be one of js, py in santacoder_fim, got 'java'"):
        documents("santacoder_fim", data_dir=str(tmp_path), language="java")


def test_a_safim_row_without_its_one_gap_is_named(tmp_path):
    good = {**GOOD, "prompt": f"a\n# {SAFIM_WORDS}\nb"}
    rows = [good, {**good, "task_id": "x/2", "eval_prompt": "x"}, {**good, "task_id": "x/3", "lang": "java"}]
    (tmp_path / "block_completion.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        ValueError, match="2 of 3 rows cannot be used: line 2 has no gap: prompt must .*; line 3 has no"
    ):
        documents("safim_block", data_dir=str(tmp_path))
    (tmp_path / "block_completion.jsonl").write_text(json.dumps(good))
    (row,) = documents("safim_block", data_dir=str(tmp_path))["test"]
    assert (row["infill_prefix"], row["infill_middle"], row["infill_suffix"]) == ("a\n", "m", "\nb")


def test_an_edit_shows_what_it_replaces_and_rows_without_a_name_get_their_number(tmp_path):
    (tmp_path / "edit").mkdir()
    row = json.dumps({**GOOD, "prompt": "a\n", "suffix": "c\n", "to_remove": "old\n", "canonical_solution": "new\n"})
    (tmp_path / "edit" / "test.jsonl.gz").write_bytes(gzip.compress(f"{row}\n{row}".encode()))
    rows = documents("real_fim_edit", data_dir=str(tmp_path))["test"]
    assert rows["task_id"] == ["real_fim_edit/0", "real_fim_edit/1"]
    whole = "".join(rows[0][f"infill_{name}"] for name in ("prefix", "middle", "suffix"))
    assert whole == "a\n<<<<<<< ORIGINAL\nold\n=======\nnew\n>>>>>>> UPDATED\nc\n"


NO_JSON = json.dumps([{"input": "x", "output": "2", "testtype": "functional"}])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("livecodebench", {"public_test_cases": "[]", "private_test_cases": "[]"}, "line 1 has no test cases"),
        (
            "livecodebench",
            {"metadata": '{"func_name": "f"}', "public_test_cases": NO_JSON},
            "test cases that are no JSON",
        ),
        ("bigcodebench", {"test": "class Tests: pass"}, r"must define the class TestCases once, .* \['Tests'\]"),
    ],
)
def test_rows_whose_tests_would_show_nothing_are_refused(tmp_path, name, change, message):
    (tmp_path / data.SOURCES[name].files[0]).write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(ValueError, match=message):
        documents(name, data_dir=str(tmp_path))
