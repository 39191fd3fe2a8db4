import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from coda_pretrain.data.__main__ import main
from coda_pretrain.data.journal import exclusive
from coda_pretrain.data.prepare import PrepareConfig, is_held_out, prepare
from coda_pretrain.data.shards import TokenShards
from coda_pretrain.data.tokenization import encoder_of, load_tokenizer


def documents(count=120):
    rng = np.random.default_rng(0)
    words = ["def", "return", "first", "second", "+", "(", ")", ":", "\n    ", "<|mask|>", "caf\u00e9"]
    return [" ".join(rng.choice(words, rng.integers(5, 80))) for _ in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """JSONL, text and unusable files: 120 documents in records, 3 in files."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    for number in range(3):
        (folder / f"file{number}.py").write_text(f"value = {number}\n")
    (folder / "empty.py").write_text("")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    return folder


@pytest.fixture
def config_of(corpus, tokenizer_dir, tmp_path):
    """A function that makes a configuration writing to a folder of the given name."""

    def make(name, **options):
        settings = {"inputs": (str(corpus),), "shard_tokens": 500, **options}
        return PrepareConfig(tokenizer=str(tokenizer_dir), output=str(tmp_path / name), **settings)

    return make


def hashes(folder):
    files = sorted(
        path for path in folder.rglob("*") if path.suffix in (".bin", ".ends") or path.name == "manifest.json"
    )
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_texts(folder, encoder):
    shards = TokenShards(folder)
    ids, segments = shards.read(0, shards.num_tokens)
    texts = [ids[segments == number].tolist() for number in range(1, segments.max() + 1)]
    assert all(text[-1] == shards.tokenizer["document_end_id"] for text in texts)
    return [encoder.decode(text[:-1], skip_special_tokens=False) for text in texts]


def test_shards_hold_exactly_the_documents_and_the_manifest_counts_them(config_of, tmp_path, tokenizer_dir):
    summary = prepare(config_of("out"))
    encoder = encoder_of(load_tokenizer(str(tokenizer_dir), "<|endoftext|>"))
    assert read_texts(tmp_path / "out", encoder) == documents() + [f"value = {n}\n" for n in range(3)]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(manifest["shards"]) > 5
    TokenShards(tmp_path / "out").verify()
    counts = {"documents": 123, "empty": 1, "undecodable": 1, "tokens": manifest["tokens"]}
    assert manifest["input_totals"] == counts
    assert {name: summary[name] for name in counts} == counts
    by_name = {path.rsplit("/", 1)[1]: entry for path, entry in manifest["input_files"].items()}
    assert by_name["empty.py"] == {"documents": 0, "tokens": 0, "empty": 1, "undecodable": 0}
    assert by_name["latin.txt"] == {"documents": 0, "tokens": 0, "empty": 0, "undecodable": 1}
    assert by_name["a.jsonl"]["documents"] == 120


def test_the_result_does_not_depend_on_the_number_of_workers(config_of, tmp_path):
    for workers in (1, 2):
        prepare(config_of(f"out{workers}", num_workers=workers, validation_fraction=0.2))
    assert hashes(tmp_path / "out1") == hashes(tmp_path / "out2")
    assert len(hashes(tmp_path / "out1")) > 20


def test_held_out_documents_are_a_function_of_their_text(config_of, tmp_path, tokenizer_dir):
    prepare(config_of("out", validation_fraction=0.2))
    encoder = encoder_of(load_tokenizer(str(tokenizer_dir), "<|endoftext|>"))
    train = read_texts(tmp_path / "out", encoder)
    held_out = read_texts(tmp_path / "out" / "validation", encoder)
    assert sorted(train + held_out) == sorted(documents() + [f"value = {n}\n" for n in range(3)])
    assert all(is_held_out(text, 0.2) for text in held_out)
    assert not any(is_held_out(text, 0.2) for text in train)
    assert 8 < len(held_out) < 45


KILLED_RUN = """
import dataclasses, os, signal
from coda_pretrain.data import journal, prepare

add = journal.Progress.add

def add_and_die(self, line):
    add(self, line)
    if len(self.finished) == 4:
        os.kill(os.getpid(), signal.SIGKILL)

journal.Progress.add = add_and_die
prepare.prepare(prepare.PrepareConfig(**{settings!r}))
"""


def test_a_run_killed_in_the_middle_continues_to_the_same_hashes(config_of, corpus, dirty, tmp_path):
    options = {"inputs": (str(corpus), str(dirty)), "max_bad_share": 0.6}
    prepare(config_of("whole", **options))
    config, killed = config_of("killed", num_workers=2, **options), tmp_path / "killed"
    code = KILLED_RUN.format(settings=dataclasses.asdict(config))
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    time.sleep(0.3)  # the workers notice by themselves
    with pytest.raises(ValueError, match="its preparation is not finished"):
        TokenShards(killed)
    (killed / ".train-000099.bin.1.tmp").write_bytes(b"half")
    summary = prepare(config)
    assert 0 < summary["new_tokens"] < summary["tokens"]
    assert hashes(killed) == hashes(tmp_path / "whole")
    assert not list(killed.glob(".*.tmp"))


BAD_FILES = {
    "gone.jsonl": "a link to nowhere, which is not there",
    "self.jsonl": "a link that leads back to itself",
    "pipe.jsonl": "a FIFO, socket or device, not a file",
    "fake.jsonl.gz": "not gzip, as its name says",
    "cut.jsonl.gz": "Truncated compressed stream",
    "broken.parquet": "not a whole parquet file",
    "shape.parquet": "no column --text_key 'text'; it has ['body']",
    "pointer.jsonl": "a Git LFS pointer",
}
BAD_RECORDS = (
    "not JSON that can be read: Exceeds the limit (4300 digits)",
    "JSON nested deeper than 256",
    "no --text_key 'text'; it has ['content']",
    "no --text_key 'text'; it is no object but list",
    "--text_key text must hold text, got int",
    "half of a surrogate pair",
    "not JSON that can be read: Unterminated string",
)


def test_a_dirty_folder_gives_its_good_rest_and_a_manifest_that_names_each_bad_item(config_of, dirty, tmp_path):
    options = {"inputs": (str(dirty),), "shard_tokens": 40, "max_bad_share": 0.6}
    summary = prepare(config_of("one", **options))
    prepare(config_of("two", num_workers=2, **options))
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    TokenShards(tmp_path / "one").verify()
    named = {path.removeprefix(f"{dirty}/"): counts["documents"] for path, counts in manifest["input_files"].items()}
    good = {"a.jsonl": 4, "bom.jsonl": 4, "c.parquet": 4, "caf\\xe9.jsonl": 4, "d.ndjson": 4, "mounted/e.jsonl": 4}
    assert named == {**good, "cut.jsonl.gz": named["cut.jsonl.gz"]}
    skipped = manifest["skipped"]
    assert (skipped["documents"], skipped["files"]) == (len(BAD_RECORDS), len(BAD_FILES))
    reasons = {item["path"].removeprefix(f"{dirty}/"): item["reason"] for item in skipped["items"]}
    assert all(reasons[name].startswith(reason) for name, reason in BAD_FILES.items()), reasons
    records = [item for item in skipped["items"] if item["path"] == f"{dirty}/a.jsonl"]
    for item, reason in zip(records, BAD_RECORDS, strict=True):
        assert item["reason"].startswith(reason)
        assert item["where"].startswith("byte ")
    assert manifest["passed_over"]["names"] == [f"{dirty}/loop", f"{dirty}/notes.pdf"]
    assert summary["documents"] == manifest["documents"] == sum(named.values())


def test_more_that_is_unreadable_than_allowed_stops_with_the_list(config_of, dirty, tmp_path, caplog):
    arguments = ["--input", str(dirty), "--tokenizer", config_of("out").tokenizer, "--num_workers", "1"]
    arguments += ["--output", str(tmp_path / "out")]
    assert main([*arguments, "--max_bad_share", "0.6"]) == 0
    for share, number, noun in (("0.1", "7 of 14", "files"), ("0.52", "8 of 14", "files")):
        output = tmp_path / f"out{share}"
        assert main([*arguments[:-1], str(output), "--max_bad_share", share]) == 2
        message = caplog.records[-1].getMessage()
        assert f"{number} {noun} cannot be read, more than --max_bad_share {share} allows" in message
        assert "gone.jsonl: a link to nowhere, which is not there" in message
        assert not (output / "manifest.json").exists()
        # what opening the files shows stops the work before it begins; what reading shows keeps what is made
        assert output.exists() == (share == "0.52")
    assert main([*arguments[:-1], str(tmp_path / "out0.52"), "--max_bad_share", "0.6"]) == 0
    assert hashes(tmp_path / "out0.52") == hashes(tmp_path / "out")


def test_a_wrong_text_key_stops_long_before_the_end(config_of, tmp_path):
    lines = [json.dumps({"content": "x" * 200}) for _ in range(400)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"of about \d+ documents cannot be read(.|\n)*it has \['content'\]"):
        prepare(config_of("out", inputs=(str(tmp_path / "in"),), shard_tokens=100))
    assert len((tmp_path / "out" / "progress.jsonl").read_text().splitlines()) < 20


def test_a_damaged_shard_and_a_torn_line_are_done_again_and_the_rest_is_kept(config_of, tmp_path):
    out = tmp_path / "out"
    prepare(config_of("out"))
    expected = hashes(out)
    (out / "train-000002.bin").write_bytes(b"damaged")
    (out / "manifest.json").unlink()
    lines = (out / "progress.jsonl").read_text().splitlines(keepends=True)
    (out / "progress.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    kept = (out / "train-000001.bin").stat().st_mtime_ns
    summary = prepare(config_of("out"))
    assert hashes(out) == expected
    assert (out / "train-000001.bin").stat().st_mtime_ns == kept
    assert 0 < summary["new_tokens"] < summary["tokens"] / 2


def test_nothing_is_done_twice(config_of):
    prepare(config_of("out"))
    assert prepare(config_of("out"))["new_tokens"] == 0


def test_another_preparation_is_not_mixed_in(config_of, tmp_path):
    prepare(config_of("out"))
    with pytest.raises(ValueError, match=r"shards of another preparation \(different: shard_tokens\).*--overwrite"):
        prepare(config_of("out", shard_tokens=700))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    prepare(config_of("out", shard_tokens=700, overwrite=True))
    prepare(config_of("fresh", shard_tokens=700))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_preparation_of_input_that_has_changed_is_not_continued(config_of, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.py").write_text("x = 1\n")
    prepare(config_of("out", inputs=(str(tmp_path / "in"),)))
    (tmp_path / "in" / "b.py").write_text("y = 1\n")
    with pytest.raises(ValueError, match=r"shards of another preparation \(different: input\)"):
        prepare(config_of("out", inputs=(str(tmp_path / "in"),)))


def test_two_preparations_do_not_write_to_one_folder(config_of, tmp_path):
    (tmp_path / "out").mkdir()
    with exclusive(tmp_path / "out"), pytest.raises(ValueError, match="another preparation is writing there"):
        prepare(config_of("out"))


def test_shards_are_not_written_among_the_text(config_of, corpus, tmp_path):
    config = dataclasses.replace(config_of("out"), output=str(corpus / "sub" / "out"))
    with pytest.raises(ValueError, match="must not lie inside --input"):
        prepare(config)
    assert not (corpus / "sub").exists()


def test_a_corpus_without_a_document_is_an_error(config_of, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.txt").write_bytes(b"\xff")
    (tmp_path / "bad" / "b.txt").write_bytes(b" \n")
    message = "no document was found in 2 inputs: 1 are empty, 1 cannot be decoded"
    with pytest.raises(ValueError, match=message):
        prepare(config_of("out", inputs=(str(tmp_path / "bad"),)))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_empty_validation_split_is_an_error(config_of, corpus):
    with pytest.raises(ValueError, match=r"the validation split got none of 3 documents"):
        prepare(config_of("out", inputs=(str(corpus / "file*.py"),), validation_fraction=1e-9))


def test_a_local_data_set_gives_the_same_tokens_as_its_file(config_of, corpus, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_dict({"body": documents()}).save_to_disk(str(tmp_path / "saved"))
    options = {"inputs": (), "hf_dataset": str(tmp_path / "saved"), "text_key": "body"}
    for workers in (1, 2):
        prepare(config_of(f"set{workers}", num_workers=workers, **options))
    assert hashes(tmp_path / "set1") == hashes(tmp_path / "set2")
    prepare(config_of("file", inputs=(str(corpus / "a.jsonl"),)))
    streams = [TokenShards(tmp_path / name) for name in ("set1", "file")]
    assert streams[0].num_tokens == streams[1].num_tokens
    assert np.array_equal(*(shards.read(0, shards.num_tokens)[0] for shards in streams))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": ()}, "give exactly one of --input and --hf_dataset"),
        ({"hf_dataset": "name"}, "give exactly one of --input and --hf_dataset"),
        ({"num_workers": 0}, "--num_workers must be at least 1, got 0"),
        ({"shard_tokens": -5}, "--shard_tokens must be at least 1, got -5"),
        ({"validation_fraction": 1.0}, r"--validation_fraction must be in \[0, 1\), got 1.0"),
        ({"max_bad_share": 1.5}, r"--max_bad_share must be in \[0, 1\], got 1.5"),
        ({"text_suffixes": ("py",)}, "--text_suffixes must start with a dot"),
    ],
)
def test_bad_settings_are_named(config_of, options, message):
    with pytest.raises(ValueError, match=message):
        config_of("out", **options)
