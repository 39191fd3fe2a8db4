"""Token shards through datatrove: the same tokens as the built-in preparation, in a folder or behind a URL."""

import json

import numpy as np
import pytest

pytest.importorskip("datatrove")

from coda_pretrain.data.cluster import WriteManifests, WriteTokenShards, main
from coda_pretrain.data.prepare import PrepareConfig, prepare
from coda_pretrain.data.shards import TokenShards
from coda_pretrain.data.tokenization import load_tokenizer


@pytest.fixture
def texts(tmp_path):
    """Four files of documents, some of them empty or with the text of a control token."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(4):
        lines = [f"def f_{number}_{i}():\n    return '<|mask|>'\n" * (1 + i % 3) for i in range(20)] + ["  "]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def documents_of(shards):
    ids, segments = shards.read(0, shards.num_tokens)
    ends = np.flatnonzero(np.diff(segments, append=0)) + 1
    return sorted(tuple(part.tolist()) for part in np.split(ids, ends)[:-1])


def run(texts, tokenizer_dir, output, *more):
    arguments = ["--input", str(texts), "--tokenizer", str(tokenizer_dir), "--output", str(output)]
    return main([*arguments, "--tasks", "3", "--workers", "1", *more])


def test_a_local_pipeline_makes_the_documents_of_the_built_in_preparation(texts, tokenizer_dir, tmp_path):
    held_out = ["--validation_fraction", "0.2", "--shard_tokens", "500"]
    assert run(texts, tokenizer_dir, tmp_path / "out", *held_out) == 0
    config = PrepareConfig(
        inputs=(str(texts),), tokenizer=str(tokenizer_dir), output=str(tmp_path / "own"), validation_fraction=0.2
    )
    prepare(config)
    for split in ("", "validation"):
        made, own = TokenShards(tmp_path / "out" / split), TokenShards(tmp_path / "own" / split)
        made.verify()
        assert made.tokenizer == own.tokenizer
        assert documents_of(made) == documents_of(own)
    assert len(TokenShards(tmp_path / "out").shards) > 3  # tasks start another shard when one is full


def test_shards_go_behind_a_url_and_a_second_run_does_nothing(texts, tokenizer_dir, tmp_path):
    url = f"file://{tmp_path}/store"
    assert run(texts, tokenizer_dir, url) == 0
    TokenShards(url).verify()
    manifest = tmp_path / "store" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    assert run(texts, tokenizer_dir, url) == 0
    assert manifest.stat().st_mtime_ns == written


def test_a_dirty_folder_gives_what_the_built_in_preparation_gives(dirty, tokenizer_dir, tmp_path, capsys):
    more = ["--pattern", "**/*.jsonl*", "--max_bad_share"]
    assert run(dirty, tokenizer_dir, tmp_path / "out", *more, "0.1") == 2
    message = capsys.readouterr().err
    assert "5 of 10 files cannot be read, more than --max_bad_share 0.1 allows" in message
    assert "gone.jsonl: a link to nowhere, which is not there" in message
    assert not (tmp_path / "out").exists()
    assert run(dirty, tokenizer_dir, tmp_path / "out", *more, "0.5") == 2  # one file more is found when it is read
    assert "cut.jsonl.gz, after line" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run(dirty, tokenizer_dir, tmp_path / "out", *more, "0.6") == 0
    pattern = str(dirty / "**/*.jsonl*")
    own = {"inputs": (pattern,), "tokenizer": str(tokenizer_dir), "output": str(tmp_path / "own")}
    prepare(PrepareConfig(**own, max_bad_share=0.6))
    assert documents_of(TokenShards(tmp_path / "out")) == documents_of(TokenShards(tmp_path / "own"))
    made, expected = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("out", "own"))
    assert made["input_files"] == expected["input_files"]
    assert made["input_totals"] == expected["input_totals"]
    reasons = [{(i["path"], i["reason"]) for i in manifest["skipped"]["items"]} for manifest in (made, expected)]
    assert reasons[0] == reasons[1]
    assert len(reasons[0]) == 13


def test_tasks_of_other_text_or_settings_are_not_mixed_in(texts, tokenizer_dir, tmp_path, capsys):
    assert run(texts, tokenizer_dir, tmp_path / "out") == 0
    assert run(texts, tokenizer_dir, tmp_path / "out", "--validation_fraction", "0.5") == 2
    assert "tasks of another preparation (different: validation_fraction)" in capsys.readouterr().err
    (texts / "0.jsonl").write_text('{"text": "another"}\n')
    assert run(texts, tokenizer_dir, tmp_path / "out") == 2
    assert "tasks of another preparation (different: input)" in capsys.readouterr().err


def test_an_input_without_a_file_is_named(tokenizer_dir, texts, tmp_path, capsys):
    assert run(texts, tokenizer_dir, tmp_path / "out", "--pattern", "*.csv") == 2
    assert "holds no file that --pattern *.csv matches" in capsys.readouterr().err


def test_no_manifest_is_written_before_every_task_has_finished(tokenizer_dir, tmp_path):
    facts = load_tokenizer(str(tokenizer_dir), "<|endoftext|>")
    WriteTokenShards(facts, str(tmp_path), shard_tokens=100, validation_fraction=0.0).run(
        iter([]), rank=0, world_size=2
    )
    with pytest.raises(ValueError, match=r"000001\.json is missing: that task has not finished"):
        WriteManifests(facts, str(tmp_path), tasks=2).run()
    assert not (tmp_path / "manifest.json").exists()


def test_slurm_needs_a_partition(texts, tokenizer_dir, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(texts, tokenizer_dir, tmp_path / "out", "--executor", "slurm")
    assert "--executor slurm needs --slurm_partition" in capsys.readouterr().err
