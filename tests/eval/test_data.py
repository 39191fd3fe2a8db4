"""Problems come from the named place, and a missing or broken file is named."""

import gzip
import json

import pytest

from coda_eval import data
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
        ('{"task_id": "a"}', "row 1 of .* lacks middle, prefix, suffix"),
        ("not json", "is not JSON lines"),
        ("", "has 0 rows"),
        (json.dumps(ROW) + "\n" + json.dumps(ROW), "has 2 rows with 1 different task_id"),
    ],
)
def test_broken_file_is_an_error_that_names_it(tmp_path, text, message):
    (tmp_path / "quickstart_infill.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        documents("quickstart_infill", data_dir=str(tmp_path))
