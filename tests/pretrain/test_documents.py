import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coda_pretrain.documents import Part, find_files, group_parts, load_dataset, parts_of_file, read_documents

TEXT_SUFFIXES = (".txt", ".py")


def read_all(path, piece_bytes=10**9, text_key="text"):
    parts = parts_of_file(str(path), TEXT_SUFFIXES, piece_bytes)
    return [(d.text, d.problem) for part in parts for d in read_documents(part, text_key)]


def texts(count):
    return [f"document {i} " + "\u00e9\n\t x" * (i % 13) for i in range(count)]


@pytest.mark.parametrize("piece_bytes", [1, 7, 100, 10**9])
@pytest.mark.parametrize("last_newline", [True, False])
def test_every_line_of_jsonl_is_read_once_however_it_is_cut(tmp_path, piece_bytes, last_newline):
    path = tmp_path / "a.jsonl"
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts(40))
    path.write_text(lines + "\n" * last_newline, encoding="utf-8")
    assert read_all(path, piece_bytes) == [(text, None) for text in texts(40)]


def test_compressed_jsonl_is_read(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(40))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    pa_path = tmp_path / "b.jsonl.zst"
    with pa.CompressedOutputStream(str(pa_path), "zstd") as stream:
        stream.write(lines.encode())
    for path in (tmp_path / "a.jsonl.gz", pa_path):
        assert read_all(path, piece_bytes=10) == [(text, None) for text in texts(40)]


@pytest.mark.parametrize("piece_bytes", [1, 10**9])
def test_every_row_of_parquet_is_read_once(tmp_path, piece_bytes):
    table = pa.table({"content": [*texts(40), None], "id": list(range(41))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    expected = [(text, None) for text in texts(40)] + [(None, "empty")]
    assert read_all(tmp_path / "a.parquet", piece_bytes, "content") == expected


def test_text_files_are_one_document_each_with_their_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\ttwo \n".encode())
    assert read_all(tmp_path / "a.txt") == [("one\r\n\ttwo \n", None)]


def test_a_python_file_may_declare_its_encoding(tmp_path):
    (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\nname = '\u00e9'\n".encode("latin-1"))
    assert read_all(tmp_path / "a.py") == [("# -*- coding: latin-1 -*-\nname = '\u00e9'\n", None)]
    (tmp_path / "b.py").write_bytes(b"# coding: nonsense\n")
    assert read_all(tmp_path / "b.py") == [(None, "undecodable")]


def test_undecodable_and_empty_documents_are_marked(tmp_path):
    (tmp_path / "a.py").write_bytes(b"name = '\xff\xfe'\n")
    (tmp_path / "b.py").write_bytes(b"")
    (tmp_path / "c.jsonl").write_bytes(
        b'{"text": "good"}\n{"text": "\xff"}\n\n{"text": \n{"text": ""}\n{"text": " \\n"}\n{"text": null}\n'
        b'{"text": "\\ud800"}\n{"text": "last"}\n'
    )
    assert read_all(tmp_path / "a.py") == [(None, "undecodable")]
    assert read_all(tmp_path / "b.py") == [(None, "empty")]
    problems = [problem for _, problem in read_all(tmp_path / "c.jsonl")]
    bad, no = "undecodable", "empty"
    assert problems == [None, bad, bad, no, no, no, bad, None]


def test_a_missing_text_key_names_the_keys_there_are(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x", "id": 1}\n')
    with pytest.raises(ValueError, match=r"a record has no --text_key 'text'; it has \['content', 'id'\]"):
        read_all(tmp_path / "a.jsonl")
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column --text_key 'text'; it has \['content'\]"):
        read_all(tmp_path / "a.parquet")


def test_a_value_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match="--text_key text must hold text, got int"):
        read_all(tmp_path / "a.jsonl")


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"a\.parquet is not a parquet file"):
        read_all(tmp_path / "a.parquet")


def test_files_are_found_in_folders_and_by_pattern_once_and_sorted(tmp_path):
    for name in ("b.py", "sub/a.py", "sub/c.jsonl", "sub/skip.bin", "test/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files([str(tmp_path), str(tmp_path / "**/*.py")], ["*/test/*"], TEXT_SUFFIXES)
    assert [path.removeprefix(f"{tmp_path}/") for path in found] == ["b.py", "sub/a.py", "sub/c.jsonl"]


def test_inputs_that_give_nothing_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such file or folder, and as a pattern it matches nothing"):
        find_files([str(tmp_path / "nowhere")], [], TEXT_SUFFIXES)
    with pytest.raises(ValueError, match=re.escape(f"--input {tmp_path}: holds no file with a suffix of .jsonl")):
        find_files([str(tmp_path)], [], TEXT_SUFFIXES)
    (tmp_path / "a.bin").write_text("x")
    with pytest.raises(ValueError, match=r"a\.bin: the suffix must be one of .jsonl"):
        find_files([str(tmp_path / "a.bin")], [], TEXT_SUFFIXES)
    (tmp_path / "a.py").write_text("x")
    with pytest.raises(ValueError, match=r"holds no file that --exclude leaves over \(1 before\)"):
        find_files([str(tmp_path)], ["*.py"], TEXT_SUFFIXES)


def test_small_parts_are_joined_and_none_is_lost():
    parts = [Part(str(i), "text", 0, size, size) for i, size in enumerate([3, 3, 3, 20, 1, 1])]
    groups = group_parts(iter(parts), 6)
    assert [[part.path for part in group] for group in groups] == [["0", "1"], ["2", "3"], ["4", "5"]]


def test_a_data_set_is_loaded_from_a_local_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("".join(json.dumps({"text": t, "id": 1}) + "\n" for t in texts(9)))
    loaded = load_dataset(str(tmp_path / "rows"), None, "train", "text")
    datasets.Dataset.from_dict({"text": texts(9)}).save_to_disk(str(tmp_path / "saved"))
    saved = load_dataset(str(tmp_path / "saved"), None, "train", "text")
    for dataset in (loaded, saved):
        part = Part("rows", "dataset", 2, 8, 1)
        assert [d.text for d in read_documents(part, "text", dataset)] == texts(9)[2:8]
    with pytest.raises(ValueError, match="no column --text_key 'body'"):
        load_dataset(str(tmp_path / "saved"), None, "train", "body")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"--hf_dataset .*nothing \(--hf_config None, --hf_split train\)"):
        load_dataset(str(tmp_path / "nothing"), None, "train", "text")
