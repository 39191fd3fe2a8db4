"""Rows know where they end; an epoch is a pure function of its seed and number."""

import numpy as np
import pytest
from datasets import Dataset

from coda_posttrain.batches import EpochOrder, NumberedRows, scan_ends

END = 7


def dataset() -> Dataset:
    ids = [[1, 2, END, 3], [1, END], [1, 2, 3, 4], [END, 1, 2, 3, 4]]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * len(row) for row in ids]})


def order(epoch: int, grouped: bool, count: int = 103, batch_size: int = 10) -> list[int]:
    lengths = np.arange(count) % 17
    sampler = EpochOrder(lengths, batch_size=batch_size, seed=3, grouped=grouped, current_epoch=lambda: epoch)
    assert len(sampler) == count
    return list(sampler)


def test_scan_gives_lengths_and_ends():
    lengths, ended = scan_ends(dataset(), END)
    assert lengths.tolist() == [4, 2, 4, 5]
    assert ended.tolist() == [True, True, False, False]
    lengths, ended = scan_ends(dataset().select([3, 1]), END)  # with an indices mapping
    assert (lengths.tolist(), ended.tolist()) == ([5, 2], [False, True])


def test_cut_rows_are_kept_or_left_out():
    kept = NumberedRows(dataset(), name="dataset", eos_token_id=END, cutoff_len=4, drop_cut=False)
    assert [kept[i]["ended"] for i in range(len(kept))] == [True, True, False, False]
    dropped = NumberedRows(dataset(), name="dataset", eos_token_id=END, cutoff_len=4, drop_cut=True)
    assert [dropped[i]["input_ids"] for i in range(len(dropped))] == [[1, 2, END, 3], [1, END]]
    assert [dropped[i]["sample_id"] for i in range(2)] == [0, 1]


def test_data_without_an_end_token_is_refused():
    with pytest.raises(ValueError, match="no row ends with the end token 55"):
        NumberedRows(dataset(), name="dataset", eos_token_id=55, cutoff_len=4, drop_cut=False)
    with pytest.raises(ValueError, match="none of 4 rows is left; raise cutoff_len=4"):
        NumberedRows(dataset(), name="dataset", eos_token_id=55, cutoff_len=4, drop_cut=True)


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_holds_every_row_once_and_repeats_exactly(grouped):
    assert sorted(order(0, grouped)) == list(range(103))
    assert order(0, grouped) == order(0, grouped)
    assert order(0, grouped) != order(1, grouped)


def test_grouped_batches_are_about_equally_long():
    def padding(rows: list[int]) -> int:
        batches = [np.array(rows[i : i + 10]) % 17 for i in range(0, 100, 10)]
        return sum(int(batch.max() * len(batch) - batch.sum()) for batch in batches)

    assert padding(order(0, True)) < 0.2 * padding(order(0, False))
