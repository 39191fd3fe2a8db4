import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coda_pretrain.data.documents import Part, group_parts, load_dataset, parts_of_file, read_documents
from coda_pretrain.data.inputs import UnreadableFileError

TEXT_SUFFIXES = (".txt", ".py")


def read_all(path, piece_bytes=10**9, text_key="text"):
    parts = parts_of_file(str(path), TEXT_SUFFIXES, piece_bytes, text_key)
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
    for encoding in (b"nonsense", b"rot13", b"idna"):  # the second is known and no encoding of text
        (tmp_path / "b.py").write_bytes(b"# coding: " + encoding + b"\nname = '\xe9'\n")
        assert read_all(tmp_path / "b.py") == [(None, "undecodable")]


def test_undecodable_and_empty_documents_are_marked(tmp_path):
    (tmp_path / "a.py").write_bytes(b"name = '\xff\xfe'\n")
    (tmp_path / "b.py").write_bytes(b"")
    (tmp_path / "c.jsonl").write_bytes(
        b'{"text": "good"}\n{"text": "\xff"}\n\n{"text": \n{"text": ""}\n{"text": " \\n"}\n{"text": null}\n'
        b'{"text": "\\ud800"}\n{"text": "last"}\n'
    )
    (tmp_path / "d.py").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    for name in ("a.py", "d.py"):
        assert read_all(tmp_path / name) == [(None, "undecodable")]
    assert read_all(tmp_path / "b.py") == [(None, "empty")]
    problems = [problem for _, problem in read_all(tmp_path / "c.jsonl")]
    bad, no = "undecodable", "empty"
    assert problems == [None, bad, bad, no, no, no, bad, None]


def test_records_of_another_shape_are_marked_with_the_reason(tmp_path):
    lines = ['{"content": "x", "id": 1}', '{"text": 3}', '["text"]', "7", '{"text": "good"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert [problem for _, problem in read_all(tmp_path / "a.jsonl")] == ["undecodable"] * 4 + [None]
    reasons = [d.reason for d in read_documents(Part(str(tmp_path / "a.jsonl"), "jsonl", 0, 999, 999), "text")]
    assert reasons[0] == "no --text_key 'text'; it has ['content', 'id']"
    assert reasons[1] == "--text_key text must hold text, got int"
    assert reasons[2] == "no --text_key 'text'; it is no object but list"


def test_json_that_the_parser_cannot_take_is_a_bad_record_whatever_the_depth_of_the_stack(tmp_path):
    nested = ["[" * depth + "]" * depth for depth in (100, 400, 100_000)]
    lines = [f'{{"text": "good", "n": {"1" * 5000}}}', *(f'{{"text": "good", "x": {x}}}' for x in nested)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    bad = "undecodable"
    expected = [(None, bad), ("good", None), (None, bad), (None, bad)]
    assert read_all(tmp_path / "a.jsonl") == expected

    def deeper(frames):
        return read_all(tmp_path / "a.jsonl") if frames == 0 else deeper(frames - 1)

    assert deeper(500) == expected


def test_a_byte_order_mark_costs_no_record(tmp_path):
    lines = "\ufeff" + "".join(json.dumps({"text": text}) + "\n" for text in texts(5))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    for name in ("a.jsonl", "b.jsonl.gz"):
        assert read_all(tmp_path / name, piece_bytes=20) == [(text, None) for text in texts(5)]


def test_a_truncated_compression_gives_what_lies_before_the_fault(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(20_000))
    for name, content in (("a.jsonl.gz", gzip.compress(lines.encode())), ("a.jsonl.zst", None)):
        path = tmp_path / name
        if content is None:
            with pa.CompressedOutputStream(str(path), "zstd") as stream:
                stream.write(lines.encode())
            content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        got = read_all(path)
        assert got[:-1] == [(text, None) for text in texts(len(got) - 1)]
        assert len(got) > 1000
        assert got[-1] == (None, "unreadable")


def test_broken_pages_of_parquet_end_a_file_with_a_reason(tmp_path):
    pq.write_table(pa.table({"text": [f"row {i} " * 30 for i in range(4000)]}), tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[20:2000] = bytes(1980)
    (tmp_path / "a.parquet").write_bytes(content)
    assert read_all(tmp_path / "a.parquet")[-1] == (None, "unreadable")


def test_a_line_beyond_the_limit_is_skipped_and_its_neighbours_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr("coda_pretrain.data.documents.MAX_RECORD_BYTES", 100)
    lines = [json.dumps({"text": text}) for text in ("one", "x" * 500, "two")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    for path, piece_bytes in (("a.jsonl", 10**9), ("a.jsonl", 30), ("b.jsonl.gz", 30)):
        assert read_all(tmp_path / path, piece_bytes) == [("one", None), (None, "undecodable"), ("two", None)]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.parquet", b"not parquet at all", "not a whole parquet file"),
        ("a.jsonl.gz", b"not gzip at all", "not gzip, as its name says"),
        ("a.jsonl.zst", b"", "empty, and so not zstd"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "gzip, but its name does not say so"),
        ("b.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "a Git LFS pointer"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_known_at_the_start(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableFileError, match=reason):
        list(parts_of_file(str(tmp_path / name), TEXT_SUFFIXES, 10**9, "text"))


def test_a_parquet_file_without_a_column_of_text_is_known_at_the_start(tmp_path):
    pq.write_table(pa.table({"content": ["x"], "raw": [b"x"]}), tmp_path / "a.parquet")
    for key, reason in (("text", r"no column --text_key 'text'; it has \['content', 'raw'\]"), ("raw", "got binary")):
        with pytest.raises(UnreadableFileError, match=reason):
            list(parts_of_file(str(tmp_path / "a.parquet"), TEXT_SUFFIXES, 10**9, key))


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
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"--hf_dataset .*broken"):
        load_dataset(str(tmp_path / "broken"), None, "train", "text")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"--hf_dataset .*nothing \(--hf_config None, --hf_split train\)"):
        load_dataset(str(tmp_path / "nothing"), None, "train", "text")
