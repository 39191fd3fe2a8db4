import json
import re
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest

from coda_pretrain.data.shards import ShardWriter, TokenShards, token_dtype


def random_documents(seed, count, longest=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 300, rng.integers(0, longest)).tolist() for _ in range(count)]


@pytest.mark.parametrize("documents_per_shard", [1, 7, 1000])
@pytest.mark.parametrize("seq_len", [2, 13, 64])
def test_rows_hold_every_token_once_and_segments_are_the_documents(
    tmp_path, write_shards, documents_per_shard, seq_len
):
    documents = random_documents(0, 50)
    shards = TokenShards(write_shards(tmp_path, documents, documents_per_shard))
    stream = [token for document in documents for token in [*document, 0]]
    document_of = [number for number, document in enumerate(documents) for _ in range(len(document) + 1)]
    assert shards.num_tokens == len(stream)
    rows = [shards.read(row * seq_len, seq_len) for row in range(shards.num_rows(seq_len))]
    input_ids = np.concatenate([row[0] for row in rows])
    segment_ids = np.concatenate([row[1] for row in rows])
    assert input_ids[: len(stream)].tolist() == stream
    assert (segment_ids[: len(stream)] > 0).all()
    assert (segment_ids[len(stream) :] == 0).all()
    assert len(input_ids) - len(stream) < seq_len
    for start in range(0, len(stream), seq_len):
        own = document_of[start : start + seq_len]
        expected = [1 + number - own[0] for number in own]
        assert segment_ids[start : start + len(own)].tolist() == expected


def test_a_long_document_continues_in_the_next_row(tmp_path, write_shards):
    shards = TokenShards(write_shards(tmp_path, [list(range(1, 24))]))
    rows = [shards.read(start, 8) for start in (0, 8, 16)]
    assert np.concatenate([ids for ids, _ in rows]).tolist() == [*range(1, 24), 0]
    assert all((segments == 1).all() for _, segments in rows)


def test_many_shards_need_few_open_files(tmp_path, write_shards, monkeypatch):
    monkeypatch.setattr("coda_pretrain.data.shards.OPEN_SHARDS", 2)
    shards = TokenShards(write_shards(tmp_path, [[i] for i in range(1, 9)], documents_per_shard=1))
    assert shards.read(0, 16)[0].tolist() == [token for i in range(1, 9) for token in (i, 0)]
    assert shards._open.cache_info().currsize == 2


def test_the_smallest_dtype_that_holds_the_vocabulary_is_used():
    assert (token_dtype(65535), token_dtype(65536)) == ("uint16", "uint32")


def test_an_uncommitted_shard_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train-000000", "uint16") as writer:  # noqa: PT012
        writer.add([1, 0])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_manifest_is_refused(tmp_path):
    message = f"no manifest.json in {tmp_path}: not a folder of token shards, or its preparation is not finished"
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenShards(tmp_path)


def test_another_format_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": "other", "version": 3}')
    with pytest.raises(ValueError, match="must be format 'coda-token-shards' version 1, got format 'other' version 3"):
        TokenShards(tmp_path)
    for content, reason in (('{"format": ', "is not valid JSON"), ("[]", "must hold a JSON object, got list")):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=rf"manifest\.json' {reason}"):
            TokenShards(tmp_path)


def test_the_identity_is_that_of_the_content_in_its_order_wherever_it_lies(tmp_path, write_shards):
    def identity(name, documents, **options):
        return TokenShards(write_shards(tmp_path / name, documents, **options)).identity()

    documents = [[1, 2, 3], [4, 5], [6]]
    first = identity("a", documents)
    assert (first["documents"], first["tokens"]) == (3, 9)
    assert identity("b", documents) == first
    assert identity("c", [[1, 2, 3], [4, 5, 6]])["sha256"] != first["sha256"]
    shards = [identity(name, docs, documents_per_shard=1) for name, docs in (("d", documents), ("e", documents[::-1]))]
    assert shards[0]["sha256"] != shards[1]["sha256"]


def test_a_truncated_shard_is_refused(tmp_path, write_shards):
    folder = write_shards(tmp_path, [[1, 2, 3]])
    (folder / "train-000000.bin").write_bytes(b"\1\0\2\0")
    with pytest.raises(ValueError, match=r"train-000000\.bin must have 8 bytes as its manifest says, but it has 4"):
        TokenShards(folder)
    (folder / "train-000000.ends").unlink()
    (folder / "train-000000.bin").write_bytes(bytes(8))
    with pytest.raises(ValueError, match=r"train-000000\.ends must have 8 bytes .* but it is missing"):
        TokenShards(folder)


def test_verify_finds_a_changed_byte(tmp_path, write_shards):
    folder = write_shards(tmp_path, [[1, 2, 3]])
    TokenShards(folder).verify()
    (folder / "train-000000.bin").write_bytes(bytes(8))
    with pytest.raises(ValueError, match="shard train-000000 in .* does not have the hash"):
        TokenShards(folder).verify()


def test_a_manifest_without_shards_is_refused(tmp_path, write_shards):
    folder = write_shards(tmp_path, [[1]])
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "shards": []}))
    with pytest.raises(ValueError, match="lists no shards"):
        TokenShards(folder)


# -- behind a URL ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path, write_shards):
    """A folder of two shards, locally and in a store."""
    local = write_shards(tmp_path / "local", [[1, 2, 3], [4, 5], [6, 7, 8, 9]], documents_per_shard=2)
    store = fsspec.filesystem("memory")
    root = f"/tokens-{uuid.uuid4().hex}"
    for file in local.iterdir():
        store.pipe_file(f"{root}/{file.name}", file.read_bytes())
    return local, f"memory:/{root}", store, root


@pytest.mark.parametrize("with_cache", [True, False])
def test_shards_behind_a_url_read_like_local_ones(stored, tmp_path, with_cache):
    local, url, _, _ = stored
    remote = TokenShards(url, tmp_path / "cache" if with_cache else None)
    assert remote.num_tokens == TokenShards(local).num_tokens == 12
    for start, length in ((0, 12), (3, 6), (10, 4)):
        for got, expected in zip(remote.read(start, length), TokenShards(local).read(start, length), strict=True):
            np.testing.assert_array_equal(got, expected)
    remote.verify()


def test_the_cache_is_filled_once_and_only_with_what_has_the_recorded_hash(stored, tmp_path):
    _, url, store, root = stored
    TokenShards(url, tmp_path / "cache").read(0, 3)
    files = sorted(path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith("."))
    assert [Path(name).suffix for name in files].count(".bin") == 1  # the second shard was not needed
    store.pipe_file(f"{root}/train-000000.bin", bytes(14))
    store.pipe_file(f"{root}/train-000001.bin", bytes(10))
    assert TokenShards(url, tmp_path / "cache").read(0, 3)[0].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"train-000001\.bin has the hash .*, but its manifest recorded"):
        TokenShards(url, tmp_path / "cache").read(8, 2)
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 1


def test_a_shard_that_is_short_in_the_store_is_refused_at_once(stored):
    _, url, store, root = stored
    store.pipe_file(f"{root}/train-000001.bin", bytes(8))
    with pytest.raises(ValueError, match=r"train-000001\.bin must have 10 bytes as its manifest says, but it has 8"):
        TokenShards(url)
