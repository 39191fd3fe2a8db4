"""Rows are whole, or shortened where nothing is glued together, or left out and counted."""

import json
import re
from types import SimpleNamespace

import pytest
from datasets import Dataset
from llamafactory.data.parser import DatasetAttr
from llamafactory.data.template import TEMPLATES

from coda_posttrain.batches import NumberedRows
from coda_posttrain.records import (
    EMPTY_ANSWER,
    OLDEST_LEFT_OUT,
    PROMPT_TOO_LONG,
    SHORTENED,
    TOO_LONG,
    WHOLE,
    DataError,
    fates,
)
from coda_posttrain.rows import RowProcessor, describe, load_conversations, processors

from .conftest import byte_tokenizer

ROOM = 128


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def processor(tokenizer, overlong: str, cutoff_len: int = ROOM, mask_history: bool = False) -> RowProcessor:
    data_args = SimpleNamespace(
        cutoff_len=cutoff_len, mask_history=mask_history, template=None, default_system=None, tool_format=None
    )
    make = processors(overlong, other_template=False)
    return make(template=TEMPLATES["empty"], tokenizer=tokenizer, processor=None, data_args=data_args)


def conversation(*texts: str, system: str = "", fate: str = WHOLE) -> dict[str, list]:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    return {"messages": [messages], "system": [system], "tools": [""], "fate": [fate], "place": ["d.jsonl:1"]}


def row(rows: RowProcessor, *texts: str, **options) -> dict:
    return {key: values[0] for key, values in rows.preprocess_dataset(conversation(*texts, **options)).items()}


def text(*turns: str, system: str = "") -> str:
    """A conversation as the template writes it."""
    out = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    for number, turn in enumerate(turns):
        out += (
            f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n" if number % 2 == 0 else f"{turn}<|im_end|>\n"
        )
    return out


LONG = "word " * 60


@pytest.mark.parametrize("overlong", ["cut", "drop"])
@pytest.mark.parametrize("mask_history", [False, True])
def test_rows_that_fit_are_untouched(tokenizer, overlong, mask_history):
    result = row(processor(tokenizer, overlong, 512, mask_history), "a", "b", "c", "d", system="s")
    assert result["fate"] == WHOLE
    assert tokenizer.decode(result["input_ids"]) == text("a", "b", "c", "d", system="s")
    learned = [token for token in result["labels"] if token != -100]
    assert tokenizer.decode(learned) == ("" if mask_history else "b<|im_end|>\n") + "d<|im_end|>\n"


def test_a_row_of_exactly_cutoff_len_is_whole(tokenizer):
    length = len(row(processor(tokenizer, "drop", 9999), LONG, LONG)["input_ids"])
    assert row(processor(tokenizer, "drop", length), LONG, LONG)["fate"] == WHOLE
    assert row(processor(tokenizer, "drop", length - 1), LONG, LONG)["fate"] == TOO_LONG


@pytest.mark.parametrize(
    ("turns", "fate", "kept"),
    [
        ((LONG, "y = 1\n"), PROMPT_TOO_LONG, None),
        (("short", LONG), SHORTENED, ("short", LONG)),
        ((LONG, "y = 1", "next", "y = 2"), OLDEST_LEFT_OUT, ("next", "y = 2")),
        (("a", LONG, "next", "y = 2"), OLDEST_LEFT_OUT, ("next", "y = 2")),
        (("a", "b", LONG, "y = 2"), PROMPT_TOO_LONG, None),
        (("a", "b", "next", LONG), SHORTENED, ("next", LONG)),
        (("a", LONG, "b", "1", "c", "2"), OLDEST_LEFT_OUT, ("b", "1", "c", "2")),
        (("short", "it is <|im_end|> here\n" * 20), SHORTENED, ("short", "it is <|im_end|> here\n" * 20)),
        (("a<|im_end|>" * 70, "b"), PROMPT_TOO_LONG, None),
    ],
    ids=lambda value: None if isinstance(value, tuple) else value,
)
@pytest.mark.parametrize("mask_history", [False, True])
@pytest.mark.parametrize("system", ["", "be brief"])
def test_cut_rows_are_a_shorter_conversation_and_nothing_is_glued(tokenizer, turns, fate, kept, mask_history, system):
    result = row(processor(tokenizer, "cut", mask_history=mask_history), *turns, system=system)
    assert result["fate"] == fate
    if kept is None:
        assert set(result["labels"]) == {-100}
    else:
        whole = row(processor(tokenizer, "cut", 9999), *kept, system=system)["input_ids"]
        assert result["input_ids"] == (whole if fate == OLDEST_LEFT_OUT else whole[:ROOM])
        assert len(result["labels"]) == len(result["attention_mask"]) == len(result["input_ids"]) <= ROOM
        assert any(label != -100 for label in result["labels"])
    assert row(processor(tokenizer, "drop", mask_history=mask_history), *turns, system=system)["fate"] == TOO_LONG


def test_rows_with_empty_answers_are_left_out(tokenizer):
    assert row(processor(tokenizer, "cut"), "a", " \n")["fate"] == EMPTY_ANSWER
    assert row(processor(tokenizer, "cut"), "a", "", "b", "c")["fate"] == EMPTY_ANSWER
    assert row(processor(tokenizer, "cut", mask_history=True), "a", "", "b", "c")["fate"] == WHOLE


def arguments(folder, tmp_path):
    model_args = SimpleNamespace(cache_dir=str(tmp_path / "cache"))
    data_args = SimpleNamespace(
        dataset_dir=str(folder), max_samples=None, overwrite_cache=False, preprocessing_num_workers=None
    )
    return model_args, data_args, SimpleNamespace(local_process_index=0)


def test_long_prompts_are_counted_from_file_to_batch(tokenizer, tmp_path, caplog):
    rows = [{"instruction": "word " * 40 * (n % 2), "output": "y = 1"} for n in range(1, 13)]
    rows = [{**entry, "instruction": entry["instruction"] or "short"} for entry in rows]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    attr = DatasetAttr("file", dataset_name="long.jsonl")
    aligned = load_conversations(attr, *arguments(tmp_path, tmp_path))
    for overlong, left_out in (("drop", "6 too long"), ("cut", "6 prompt too long")):
        encoded = aligned.map(processor(tokenizer, overlong).preprocess_dataset, batched=True,
                              remove_columns=aligned.column_names)  # fmt: skip
        numbered = NumberedRows(encoded, name="dataset", cutoff_len=ROOM)
        assert len(numbered) == 6
        assert all(tokenizer.decode(numbered[i]["input_ids"]) == text("short", "y = 1") for i in range(6))
        assert f"6 of 12 rows were longer than cutoff_len=128: 0 are cut, 6 left out: {left_out} (first:" in caplog.text
        assert "long.jsonl:1)" in caplog.text


def test_records_beyond_the_first_are_checked_too_and_a_changed_file_is_read_again(tmp_path):
    file = tmp_path / "a.jsonl"
    good = json.dumps({"instruction": "a", "output": "b"}) + "\n"
    file.write_text(good * 1200 + '{"instruction": "a", "output": 3}\n{"instruction": "a", "out')
    attr = DatasetAttr("file", dataset_name="a.jsonl")
    with pytest.raises(DataError, match="2 of 1202 records cannot be used:\n.*a.jsonl:1201: key 'output' must be text"):
        load_conversations(attr, *arguments(tmp_path, tmp_path))
    file.write_text(good * 3)
    assert len(load_conversations(attr, *arguments(tmp_path, tmp_path))) == 3


def test_tables_give_the_same_conversations_as_json_lines(tmp_path):
    (tmp_path / "a.csv").write_text('instruction,output\na,b\nc,""\n')
    Dataset.from_dict({"instruction": ["a", "c"], "output": ["b", None]}).to_parquet(tmp_path / "a.parquet")
    for name, places in (("a.csv", [f"{tmp_path}/a.csv:2", f"{tmp_path}/a.csv:3"]),
                         ("a.parquet", ["a.parquet[0]", "a.parquet[1]"])):  # fmt: skip
        attr = DatasetAttr("file", dataset_name=name, query=None)
        dataset = load_conversations(attr, *arguments(tmp_path, tmp_path))
        assert dataset[0]["messages"] == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        assert [place for _, place in fates(dataset)] == places


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    for name, content in (("a.parquet", b"no parquet"), ("a.txt", b"caf\xe9")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"dataset '{name}': .*{name} cannot be read as "):
            load_conversations(DatasetAttr("file", dataset_name=name), *arguments(tmp_path, tmp_path))


def test_the_description_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "dataset_info.json").write_text('{"own": {"file_name": "a.csv"}}', encoding="utf-8-sig")
    assert [attr.dataset_name for attr in describe(["own"], str(tmp_path))] == ["a.csv"]


def test_a_split_may_be_a_part_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text((json.dumps({"instruction": "a", "output": "b"}) + "\n") * 10)
    attr = DatasetAttr("file", dataset_name="a.jsonl", split="train[:30%]")
    assert len(load_conversations(attr, *arguments(tmp_path, tmp_path))) == 3
    for split in ("test", "train[:"):
        attr.split = split
        with pytest.raises(DataError, match=rf"split must be train or a part of it, .*, got '{re.escape(split)}'"):
            load_conversations(attr, *arguments(tmp_path, tmp_path))
