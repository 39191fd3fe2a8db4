"""Problems come from the named place, and a missing or broken file is named."""

import gzip
import json

import pytest

from coda_eval import data, programs
from coda_eval.data import documents, problem

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
    for wrong in (0, -1, "long", 2.5, True):
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
}
"""A row that every benchmark but MBPP, whose ids are numbers, accepts."""

LATE = {
    "test": [None, 3, "def check(:", "x = '\x00'", "assert '\ud800'"],
    "test_list": [None, [], "assert True", [1], ["assert ("], ["assert '\udfff'"]],
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
}
"""Values of each field that nothing may be asked with, or that would fail when the answer is judged."""


@pytest.mark.parametrize("name", sorted(data.SOURCES))
def test_every_field_that_is_read_later_is_checked_on_load(tmp_path, name):
    source = data.SOURCES[name]
    number = {"task_id": 11} if name == "mbpp" else {}
    (file,) = source.files

    def load(row, label):
        folder = tmp_path / label
        folder.mkdir()
        (folder / file).write_text(json.dumps(row))
        return documents(name, data_dir=str(folder))

    whole = {**GOOD, **number}
    assert len(load(whole, "good")["test"]) == 1
    for field in (*source.keep, *source.needs):
        with pytest.raises(ValueError, match=f"{file}: 1 of 1 rows cannot be used: line 1 lacks {field}$"):
            load({key: value for key, value in whole.items() if key != field}, f"no_{field}")
    for field in (*source.keep, *source.needs, *source.may_have):
        for index, value in enumerate(LATE[field]):
            with pytest.raises(ValueError, match=f"{file}: .* line 1 has a wrong {field}: it must be "):
                load({**whole, field: value}, f"{field}_{index}")


def test_fields_that_programs_read_are_fields_that_are_checked():
    builders = {
        "humaneval": programs.humaneval_program,
        "humaneval_plus": programs.humaneval_program,
        "mbpp": programs.mbpp_program,
        "mbpp_plus": programs.mbpp_plus_program,
        "quickstart_problems": programs.quickstart_program,
        **{name: programs.infilling_program for name in data.SOURCES if name.endswith("_infilling")},
    }
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
        assert read <= {*source.keep, *source.needs, *source.may_have}, name


def test_mbpp_without_a_problem_of_its_test_split_is_an_error(tmp_path):
    (tmp_path / "mbpp.jsonl").write_text(json.dumps({**GOOD, "task_id": 3}))
    with pytest.raises(ValueError, match="mbpp has no problem of its test split"):
        documents("mbpp", data_dir=str(tmp_path))


def test_data_dir_that_was_read_as_a_number_is_an_error():
    with pytest.raises(ValueError, match="data_dir must be the path of a folder, got 40000"):
        documents("humaneval", data_dir=40000)
