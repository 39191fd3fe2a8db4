"""Every record is a conversation, left out for a reason that is counted, or named with its file and line."""

import csv
import gzip
import json
import re

import pytest

from coda_posttrain.arguments import check_datasets
from coda_posttrain.records import (
    MALFORMED,
    NO_ANSWER,
    NO_REQUEST,
    WHOLE,
    WRONG_TURNS,
    Layout,
    data_files,
    parse_record,
    read_records,
)
from CoDALanguageModel.errors import UserError

PAIR = {"instruction": "a", "output": "b"}
CHATML = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
        "system_tag": "system", "observation_tag": "tool",
    },
}  # fmt: skip


def turns(*pairs: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def read(file) -> list[tuple[str, str]]:
    """Place and fate of each record."""
    return [(place, parse_record(Layout(), text, problem)["fate"]) for place, text, problem in read_records(file)]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b'\xef\xbb\xbf{"instruction": "a", "output": "b"}\n\n{"instruction": "c", "output": "d"}', "a.jsonl"),
        (b'\xef\xbb\xbf[{"instruction": "a", "output": "b"},\n {"instruction": "c", "output": "d"}]', "a.json"),
        (
            gzip.compress(b'{"instruction": "a", "output": "b"}\r\n{"instruction": "c", "output": "d"}\r\n', mtime=0),
            "a.jsonl.gz",
        ),
        (b"\xef\xbb\xbfinstruction,output\na,b\nc,d\n", "a.csv"),
        (gzip.compress(b'output,instruction\r\n"b","a"\r\n\r\nd,c', mtime=0), "a.csv.gz"),
    ],
    ids=["lines with BOM", "array with BOM", "gz", "table with BOM", "table in gz"],
)
def test_bytes_of_every_shape_give_the_same_records(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    records = [json.loads(text) for _, text, problem in read_records(tmp_path / name) if not problem]
    assert records == [PAIR, {"instruction": "c", "output": "d"}]


@pytest.mark.parametrize(
    ("content", "name", "place", "message"),
    [
        (b'{"instruction": "a", "output": "b"}\n{"instruction": "a", "outp', "a.jsonl", "a.jsonl:2", "not JSON"),
        (b'{"instruction": "caf\xe9", "output": "b"}\n', "a.jsonl", "a.jsonl:1", "not UTF-8 .byte 0xe9 at 21"),
        (json.dumps(PAIR).encode("utf-16"), "a.jsonl", "a.jsonl:1", "UTF-16; convert it to UTF-8"),
        (gzip.compress(b"{}" * 9999, mtime=0)[:-12], "a.jsonl.gz", "a.jsonl.gz:1", "cannot be read"),
        (b"no gzip", "a.jsonl.gz", "a.jsonl.gz:1", "cannot be read"),
        (b"[" * 100_000, "a.json", "a.json", "not JSON"),
        (b'[{"instruction": "a", "output": "b"}, 3]', "a.json", r"a.json\[1\]", "must be an object with keys, got 3"),
        (b'{"n": ' + b"9" * 5000 + b"}", "a.jsonl", "a.jsonl:1", "not JSON"),
        (b'{"instruction": "\\ud800", "output": "b"}', "a.jsonl", "a.jsonl:1", "half of a surrogate pair"),
        (b'{"instruction": 5, "output": "b"}', "a.jsonl", "a.jsonl:1", "key 'instruction' must be text, got 5 .int"),
        (b'{"instruction": "a", "output": ["b"]}', "a.jsonl", "a.jsonl:1", "'output' must be text, got .'b'. .list"),
        (b'{"instruction": "a"}', "a.jsonl", "a.jsonl:1", "no key 'output' .it has 'instruction'"),
        (b"instruction,output\na,b\ncaf\xe9,b\n", "a.csv", "a.csv:3", "not UTF-8 .byte 0xe9 at 4"),
        ("instruction,output\na,b\n".encode("utf-16"), "a.csv", "a.csv:1", "not UTF-8 .byte 0xff at 1"),
        (b'instruction,output\n"a\nb",c\nd,e,f\n', "a.csv", "a.csv:4", "1 more values than columns"),
        (b'instruction,output\na,"b\n', "a.csv", "a.csv:2", "not CSV: unexpected end of data"),
        (b"instruction,output,output\na,b,c\n", "a.csv", "a.csv:1", "different names, got twice: 'output'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a.jsonl", "a.jsonl:1", "a Git LFS pointer"),
        (b"instruction,out\na,b\n", "a.csv", "a.csv:2", "no key 'output' .it has 'instruction', 'out'"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_by_file_and_line_before_anything_is_loaded(
    tmp_path, content, name, place, message
):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"train": {"file_name": name}}))
    with pytest.raises(ValueError, match=f"dataset 'train': 1 of . records cannot be used:\n.*{place}: .*{message}"):
        check_datasets({"dataset": "train", "dataset_dir": str(tmp_path)})


def test_what_stands_in_a_table_is_text(tmp_path):
    answers = ["42", "None", "NA", "1e5", "true", "x" * 200_000, "a\n b"]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["instruction", "output"], *(["q", answer] for answer in answers)])
    found = [parse_record(Layout(), *record[1:])["messages"][1] for record in read_records(tmp_path / "a.csv")]
    assert found == [{"role": "assistant", "content": answer} for answer in answers]


def test_optional_columns_may_appear_late(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR) + "\n" + json.dumps({**PAIR, "input": "x"}) + "\n")
    (tmp_path / "dataset_info.json").write_text('{"train": {"file_name": "a.jsonl"}}')
    check_datasets({"dataset": "train", "dataset_dir": str(tmp_path)})
    assert Layout().conversation({**PAIR, "input": "x"})["messages"][0]["content"] == "a\nx"
    assert Layout().conversation(PAIR)["messages"][0]["content"] == "a"


def test_a_data_set_that_is_nowhere_is_refused(tmp_path):
    (tmp_path / "dataset_info.json").write_text('{"train": {"formatting": "alpaca"}}')
    with pytest.raises(
        ValueError, match="dataset 'train': dataset_info.json says not where it is: give one of file_name"
    ):
        check_datasets({"dataset": "train", "dataset_dir": str(tmp_path)})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": "a.jsonl", "colums": {}}, "unknown key 'colums'; did you mean 'columns'"),
        ({"file_name": ["a.jsonl"]}, "file_name must be text, got .'a.jsonl'."),
        ({"file_name": "x" * 300}, "File name too long"),
        ({"file_name": "a.jsonl", "num_samples": "5"}, "num_samples must be a positive integer, got '5'"),
        ({"file_name": "a.jsonl", "num_samples": 0}, "num_samples must be a positive integer, got 0"),
        ({"file_name": "a.jsonl", "split": 5}, "split must be text, got 5"),
    ],
)
def test_a_wrong_entry_is_refused_before_anything_is_loaded(tmp_path, entry, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR) + "\n")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": entry}))
    with pytest.raises(UserError, match=f"dataset 'd': .*{message}"):
        check_datasets({"dataset": "d", "dataset_dir": str(tmp_path)})


def test_descriptions_that_are_nested_too_deep_are_refused(tmp_path):
    (tmp_path / "dataset_info.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="dataset_info.json cannot be read"):
        check_datasets({"dataset": "d", "dataset_dir": str(tmp_path)})


def test_two_letters_are_no_pair_of_a_history():
    layout = Layout(history="history")
    fate = layout.conversation({**PAIR, "history": ["hi", "ok"]})["fate"]
    assert fate == f"{MALFORMED}key 'history' must hold [request, answer] pairs, got 'hi' (str)"


def test_a_named_column_that_no_record_has_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR) + "\n")
    entry = {"file_name": "a.jsonl", "columns": {"prompt": "instruction", "response": "output", "system": "sytem"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"train": entry}))
    with pytest.raises(ValueError, match="no record has the columns system='sytem'"):
        check_datasets({"dataset": "train", "dataset_dir": str(tmp_path)})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"columns": {"promt": "x"}}, "unknown key columns.promt; did you mean 'prompt'"),
        ({"columns": {"images": "x"}}, "columns.images: this model reads text only"),
        ({"tags": {"role": "x"}}, "unknown key tags.role; did you mean 'role_tag'"),
        ({"formatting": "chatml"}, "formatting must be alpaca, sharegpt or openai, got 'chatml'"),
        ({"ranking": True}, "ranking data is for preference training"),
        ({"columns": {"prompt": ["a", "b"]}}, "columns.prompt must be text, got .'a', 'b'."),
        ({"tags": {"user_tag": 3}}, "tags.user_tag must be text, got 3"),
    ],
)
def test_a_wrong_description_is_refused(entry, message):
    with pytest.raises(ValueError, match=f"dataset 'd': .*{message}"):
        Layout.of("d", entry)


@pytest.mark.parametrize(
    ("record", "fate"),
    [
        (turns(("user", "a"), ("assistant", "b")), WHOLE),
        (turns(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")), WHOLE),
        (turns(("user", "a"), ("assistant", "b"), ("tool", ""), ("assistant", "d")), WHOLE),
        (turns(("user", "a")), NO_ANSWER),
        (turns(("user", "a"), ("assistant", "b"), ("user", "c")), NO_ANSWER),
        (turns(), NO_ANSWER),
        (turns(("assistant", "b")), WRONG_TURNS),
        (turns(("user", "a"), ("user", "b"), ("assistant", "c")), WRONG_TURNS),
        (turns(("user", None), ("assistant", "b")), NO_REQUEST),
        (turns(("user", 3), ("assistant", "b")), f"{MALFORMED}messages\\[0\\].content must be text, got 3"),
        (turns(("human", "a")), f"{MALFORMED}messages\\[0\\].role must be one of 'user', .*got 'human'"),
        ({"messages": "a"}, f"{MALFORMED}key 'messages' must be a list of turns"),
        ({"messages": ["a"]}, f"{MALFORMED}messages\\[0\\] must be an object"),
        ({"turns": []}, f"{MALFORMED}no key 'messages' .it has 'turns'"),
    ],
)
def test_turns_of_every_shape_have_a_fate(record, fate):
    assert re.match(fate, Layout.of("d", CHATML).conversation(record)["fate"])


@pytest.mark.parametrize(
    ("calls", "fate"),
    [
        ([{"function": {"name": "f"}}], WHOLE),
        ("f", f"{MALFORMED}messages\\[1\\].tool_calls must be a list of objects, got 'f'"),
        (5, f"{MALFORMED}messages\\[1\\].tool_calls must be a list of objects, got 5"),
        ([None], f"{MALFORMED}messages\\[1\\].tool_calls must be a list of objects, got .None."),
    ],
)
def test_calls_of_tools_need_no_tag(calls, fate):
    tags = {key: CHATML["tags"][key] for key in ("role_tag", "content_tag", "user_tag", "assistant_tag")}
    record = turns(("user", "a"), ("assistant", None))
    record["messages"][1]["tool_calls"] = calls
    assert re.match(fate, Layout.of("d", {**CHATML, "formatting": "openai", "tags": tags}).conversation(record)["fate"])


def test_missing_tags_are_explained():
    layout = Layout.of("d", {"formatting": "sharegpt", "columns": {"messages": "messages"}})
    fate = layout.conversation(turns(("user", "a"), ("assistant", "b")))["fate"]
    assert "no key 'from' (it has 'role', 'content'); write \"tags\": {\"role_tag\": \"role\"" in fate


def test_null_and_empty_requests_are_left_out_not_trained_without_a_prompt():
    for value in (None, "", "  \n"):
        assert Layout().conversation({"instruction": value, "output": "b"})["fate"] == NO_REQUEST


def test_folders_are_read_in_the_order_of_their_names(tmp_path, caplog):
    for name in ("b.jsonl", "a.jsonl.gz", ".DS_Store", "notes.md"):
        (tmp_path / name).write_text("")
    kind, files = data_files(tmp_path, "d")
    assert (kind, [file.name for file in files]) == ("json", ["a.jsonl.gz", "b.jsonl"])
    assert "notes.md is no data file and passed over" in caplog.text
    assert "DS_Store" not in caplog.text
    (tmp_path / "c.csv").write_text("")
    with pytest.raises(ValueError, match="holds files of several types .*c.csv"):
        data_files(tmp_path, "d")
