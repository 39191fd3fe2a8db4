import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from coda_pretrain.data.mixture import DataConfig, Mixture, SourceConfig, permuted_index, split_by_weight

SEQ_LEN = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory, write_shards):
    """Three sources of 60, 25 and 7 rows, in which each row's first token says source and row."""
    root = tmp_path_factory.mktemp("sources")
    sizes = {"large": 60, "medium": 25, "small": 7}
    for number, (name, rows) in enumerate(sizes.items()):
        write_shards(root / name, [[100 * number + row + 1, 7, 7] for row in range(rows)])
    return root


def mixture_of(root, weights, seed=0, **options):
    sources = tuple(SourceConfig(path=name, weight=weight) for name, weight in weights.items())
    return Mixture(DataConfig(root=str(root), sources=sources, **options), seq_len=SEQ_LEN, seed=seed)


@pytest.mark.parametrize("size", [1, 2, 3, 64, 1000, 4097])
def test_permuted_index_is_a_permutation(size):
    assert sorted(permuted_index(i, size, key=123) for i in range(size)) == list(range(size))


def test_permutations_of_other_keys_look_unrelated():
    first = np.array([permuted_index(i, 10_000, key=1) for i in range(10_000)])
    second = np.array([permuted_index(i, 10_000, key=2) for i in range(10_000)])
    assert (first == second).mean() < 0.001
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert abs(np.corrcoef(first, np.arange(10_000))[0, 1]) < 0.05


def test_unweighted_sources_are_read_exactly_once_per_epoch(folders):
    mixture = mixture_of(folders, {"large": None, "medium": None, "small": None})
    assert mixture.num_samples == 92
    for epoch in range(3):
        places = [mixture.locate(epoch * 92 + i) for i in range(92)]
        assert sorted(places) == [(0, r) for r in range(60)] + [(1, r) for r in range(25)] + [(2, r) for r in range(7)]


def test_each_epoch_has_another_order(folders):
    mixture = mixture_of(folders, {"large": None, "small": None})
    orders = [tuple(mixture.locate(epoch * 67 + i) for i in range(67)) for epoch in range(3)]
    assert len(set(orders)) == 3


def test_weights_are_honoured_exactly_in_every_epoch_and_reported(folders, caplog):
    caplog.set_level("INFO")
    mixture = mixture_of(folders, {"large": 1, "medium": 1, "small": 2}, epoch_samples=100)
    for epoch in range(4):
        counts = Counter(mixture.locate(epoch * 100 + i)[0] for i in range(100))
        assert counts == {0: 25, 1: 25, 2: 50}
    assert [share.epoch_samples for share in mixture.shares] == [25, 25, 50]
    assert [share.achieved_share for share in mixture.shares] == [0.25, 0.25, 0.5]
    assert mixture.shares[2].passes_per_epoch == 50 / 7
    assert "small: 50 of 100 samples per epoch, 0.5000 of them (asked for 0.5000), 7.14 passes" in caplog.text


def test_rows_of_a_source_are_read_equally_often_at_the_end_of_each_epoch(folders):
    mixture = mixture_of(folders, {"large": 1, "small": 3}, epoch_samples=40)
    read = Counter({(0, row): 0 for row in range(60)} | {(1, row): 0 for row in range(7)})
    for epoch in range(20):
        read.update(mixture.locate(40 * epoch + i) for i in range(40))
        for source in (0, 1):
            counts = [count for (number, _), count in read.items() if number == source]
            assert sum(counts) == (10, 30)[source] * (epoch + 1)
            assert max(counts) - min(counts) <= 1


def test_shares_are_within_one_sample_of_the_weights():
    counts = split_by_weight(2_560_000, [9.18, 3.24, 1.88, 6.47, 0.20])
    assert sum(counts) == 2_560_000
    for count, weight in zip(counts, [9.18, 3.24, 1.88, 6.47, 0.20], strict=True):
        assert abs(count - 2_560_000 * weight / 20.97) < 1


def test_any_number_of_readers_sees_the_same_samples(folders):
    weights = {"large": 2, "medium": 1}
    expected = [mixture_of(folders, weights).sample(i) for i in range(200)]
    for num_readers in (1, 2, 4):
        readers = [mixture_of(folders, weights) for _ in range(num_readers)]
        for i in reversed(range(200)):  # backwards: a reader has no position
            sample = readers[i % num_readers].sample(i)
            assert np.array_equal(sample.input_ids, expected[i].input_ids)
            assert np.array_equal(sample.segment_ids, expected[i].segment_ids)


def test_another_process_and_another_seed(folders):
    code = (
        "import sys; from coda_pretrain.data.mixture import *\n"
        f"c = DataConfig(root={str(folders)!r}, sources=(SourceConfig(path='large'), SourceConfig(path='small')))\n"
        "m = Mixture(c, seq_len=4, seed=0); print([m.locate(i) for i in range(10**12, 10**12 + 20)])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    mixture = mixture_of(folders, {"large": None, "small": None})
    places = [mixture.locate(i) for i in range(10**12, 10**12 + 20)]
    assert printed.strip() == str(places)
    other = mixture_of(folders, {"large": None, "small": None}, seed=1)
    assert places != [other.locate(i) for i in range(10**12, 10**12 + 20)]


def test_a_sample_is_the_row_it_names(folders):
    mixture = mixture_of(folders, {"large": None, "medium": None})
    for i in range(85):
        source, row = mixture.locate(i)
        sample = mixture.sample(i)
        assert sample.input_ids.tolist() == [100 * source + row + 1, 7, 7, 0]
        assert sample.segment_ids.tolist() == [1, 1, 1, 1]
        assert sample.input_ids.dtype == sample.segment_ids.dtype == np.int32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ()}, "data.sources must list at least one folder"),
        ({"sources": (SourceConfig(path="a", weight=1), SourceConfig(path="b"))}, r"missing for \['b'\]"),
        ({"sources": (SourceConfig(path="a"), SourceConfig(path="a"))}, "must name each folder once"),
        ({"sources": (SourceConfig(path="a"),), "epoch_samples": 0}, "data.epoch_samples must be at least 1, got 0"),
    ],
)
def test_bad_data_config_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(ValueError, match="data.sources.weight must be positive"):
        SourceConfig(path="a", weight=weight)


def test_a_source_that_would_never_be_read_is_an_error(folders):
    with pytest.raises(ValueError, match=r"large gets no sample in an epoch of 10 .*data.epoch_samples higher"):
        mixture_of(folders, {"large": 1, "small": 1000}, epoch_samples=10)


def test_sources_of_different_tokenizers_are_refused(folders, tmp_path, write_shards):
    write_shards(tmp_path / "other", [[1, 2]], fingerprint="another")
    with pytest.raises(ValueError, match="must be made with one tokenizer"):
        mixture_of(folders, {"large": None, str(tmp_path / "other"): None})


def test_negative_index_and_tiny_rows_are_refused(folders):
    with pytest.raises(ValueError, match="index must be at least 0, got -1"):
        mixture_of(folders, {"large": None}).sample(-1)
    with pytest.raises(ValueError, match="seq_len must be at least 2, got 1"):
        Mixture(DataConfig(root=str(folders), sources=(SourceConfig(path="large"),)), seq_len=1, seed=0)
