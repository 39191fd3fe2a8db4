"""Data sets by their Hub name: every description is valid; fetching resumes, follows lists and identifiers."""

import gzip
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from coda_pretrain.data.__main__ import main
from coda_pretrain.data.download import load_corpus

CONFIGS = Path(__file__).resolve().parents[2] / "pre-train" / "configs"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for the repositories of the Hub, and what was asked of it."""
    repository, asked = tmp_path / "hub", []
    repository.mkdir()

    def snapshot_download(repo, *, repo_type, revision, allow_patterns, local_dir, max_workers):
        asked.append((repo, repo_type, revision, allow_patterns))
        shutil.copytree(repository, local_dir, dirs_exist_ok=True)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return repository, asked


@pytest.fixture
def fetch(tmp_path):
    def fetch(**description):
        path = tmp_path / "corpus.yaml"
        path.write_text(yaml.safe_dump({"name": "corpus", "repo": "someone/corpus", **description}))
        return main(["--download", str(path), "--output", str(tmp_path / "corpora"), "--num_workers", "1"])

    return fetch


def test_every_description_is_valid_and_every_source_of_the_recipes_has_one():
    described = {load_corpus(str(path)).name for path in sorted((CONFIGS / "data").glob("*.yaml"))}
    recipes = [yaml.safe_load((CONFIGS / name).read_text()) for name in ("pretrain.yaml", "midtrain.yaml")]
    sources = {source["path"]: source["weight"] for recipe in recipes for source in recipe["data"]["sources"]}
    assert described == sources.keys() | {"fine-code"}
    for name, weight in sources.items():
        assert load_corpus(str(CONFIGS / "data" / f"{name}.yaml")).report_tokens == pytest.approx(weight * 1e9)


def test_a_data_set_is_fetched_by_its_patterns_and_tokenized_by_the_printed_command(
    hub, fetch, tmp_path, tokenizer_dir, capsys
):
    repository, asked = hub
    pq.write_table(pa.table({"code": ["x = 1\n", "y = 2\n"]}), repository / "a.parquet")
    assert fetch(files=["*.parquet"], text_key="code", revision="v1") == 0
    assert asked == [("someone/corpus", "dataset", "v1", ["*.parquet"])]
    command = capsys.readouterr().out.split("next: python -m coda_pretrain data ")[1].split()
    command[command.index("TOKENIZER_DIR")] = str(tokenizer_dir)
    command[-1] = str(tmp_path / "shards")
    assert main([*command, "--num_workers", "1"]) == 0
    assert json.loads((tmp_path / "shards" / "manifest.json").read_text())["documents"] == 2


def test_lists_of_urls_are_followed_and_files_that_are_there_are_not_fetched_again(hub, fetch, tmp_path):
    (tmp_path / "web").mkdir()
    for name in ("a", "b"):
        (tmp_path / "web" / f"{name}.jsonl").write_text('{"text": "x"}\n')
    (hub[0] / "list.txt").write_text("".join(f"file://{tmp_path}/web/{name}.jsonl\n" for name in ("a", "b")))
    assert fetch(files=[], url_lists=["list.txt"]) == 0
    (tmp_path / "web" / "a.jsonl").unlink()
    assert fetch(files=[], url_lists=["list.txt"]) == 0
    files = tmp_path / "corpora" / "corpus" / "files"
    assert sorted(path.name for path in files.iterdir()) == ["a.jsonl", "b.jsonl"]
    (files / "a.jsonl").unlink()
    assert fetch(files=[], url_lists=["list.txt"]) == 1  # gone from the web: said, and the rest is kept
    assert (files / "b.jsonl").is_file()


@pytest.mark.parametrize("nested", [False, True])
def test_identifiers_are_turned_into_texts_and_what_is_gone_is_empty(hub, fetch, tmp_path, nested):
    store = tmp_path / "store"
    store.mkdir()
    (store / "one").write_bytes(gzip.compress("caf\u00e9".encode("latin-1")))
    (store / "two").write_bytes(gzip.compress(b"print(2)\n"))
    (store / "cut").write_bytes(gzip.compress(b"print(2)\n")[:-9])
    rows = [{"blob_id": i, "enc": e} for i, e in (("one", "latin-1"), ("cut", "utf-8"), ("two", "utf-8"))]
    rows.insert(1, {"blob_id": "gone", "enc": "utf-8"})
    table = pa.table({"files": [rows[:1], rows[1:]]}) if nested else pa.Table.from_pylist(rows)
    (hub[0] / "data").mkdir()
    pq.write_table(table, hub[0] / "data" / "x.parquet")
    contents = {"url": f"file://{store}/{{blob_id}}", "encoding_key": "enc", "gzipped": True}
    assert fetch(contents={**contents, "rows_in": "files" if nested else None}) == 0
    file = tmp_path / "corpora" / "corpus" / "contents" / "data" / "x.parquet"
    assert pq.read_table(file)["text"].to_pylist() == ["caf\u00e9", None, None, "print(2)\n"]
    before = file.stat().st_mtime_ns
    assert fetch(contents={**contents, "rows_in": "files" if nested else None}) == 0
    assert file.stat().st_mtime_ns == before


def test_archives_are_unpacked(fetch, tmp_path):
    (tmp_path / "train-easy").mkdir()
    (tmp_path / "train-easy" / "sums.txt").write_text("1 + 1?\n2\n")
    with tarfile.open(tmp_path / "math-v1.0.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "train-easy", arcname="train-easy")
    assert fetch(files=[], urls=[f"file://{tmp_path}/math-v1.0.tar.gz"], unpack=True) == 0
    text = tmp_path / "corpora" / "corpus" / "unpacked" / "math-v1.0" / "train-easy" / "sums.txt"
    assert text.read_text() == "1 + 1?\n2\n"


def test_a_format_that_only_datasets_reads_becomes_parquet(hub, fetch, tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    (hub[0] / "qa").mkdir()
    shutil.copy(tmp_path / "saved" / "data-00000-of-00001.arrow", hub[0] / "qa" / "x.arrow")
    card = "---\nconfigs:\n- config_name: qa\n  data_files: qa/*.arrow\n---\n"
    (hub[0] / "README.md").write_text(card)
    assert fetch(load_configs=["qa"]) == 0
    table = pq.read_table(tmp_path / "corpora" / "corpus" / "parquet" / "qa-train.parquet")
    assert table["text"].to_pylist() == ["a", "b"]


def test_without_a_connection_the_reason_and_the_remedy_are_named(fetch, caplog, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch() == 1
    assert "someone/corpus could not be fetched from the Hub" in caplog.text
    assert "HF_HUB_OFFLINE unset" in caplog.text
    assert "the same command continues from here" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fils": ["*"]}, "unknown key fils; did you mean 'files'?"),
        ({"files": []}, "there is nothing to fetch"),
        ({"name": "a/b"}, "name must be a plain folder name"),
    ],
)
def test_a_wrong_description_is_named(fetch, caplog, change, message):
    assert fetch(**change) == 2
    assert message in caplog.text


def test_what_another_description_has_fetched_is_not_taken_for_this_one(hub, fetch, tmp_path, caplog):
    (hub[0] / "a.jsonl").write_text('{"text": "x"}\n')
    assert fetch(note="first") == 0
    assert fetch(note="said otherwise") == 0
    assert fetch(revision="v2", files=["*.parquet"]) == 2
    assert "another description of corpus has fetched (different: files, revision)" in caplog.text
    (tmp_path / "corpora" / "corpus" / "DESCRIPTION.json").unlink()  # as before descriptions were kept
    assert fetch(repo="someone/else") == 2
    assert "(different: repo)" in caplog.text


def test_urls_that_end_in_the_same_name_are_refused(hub, fetch, tmp_path, caplog):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text('{"text": "x"}\n')
    assert fetch(files=[], urls=[f"file://{tmp_path}/{folder}/a.jsonl" for folder in ("one", "two")]) == 2
    assert "several URLs end in a.jsonl" in caplog.text


def test_a_broken_archive_is_named(hub, fetch, tmp_path, caplog):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x = 1\n" * 500)
    with tarfile.open(tmp_path / "books.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "text" / "a.txt", "a.txt")
    for content in ((tmp_path / "books.tar.gz").read_bytes()[:-40], b"no archive"):
        (tmp_path / "books.tar.gz").write_bytes(content)
        shutil.rmtree(tmp_path / "corpora", ignore_errors=True)
        assert fetch(files=[], urls=[f"file://{tmp_path}/books.tar.gz"], unpack=True) == 2
        assert "books.tar.gz is not a whole tar archive" in caplog.records[-1].getMessage()
