"""Rows know where they end; an epoch is a pure function of its seed and number."""

import numpy as np
import pytest
from datasets import Dataset

from coda_posttrain.batches import EpochOrder, NumberedRows
from coda_posttrain.records import EMPTY_ANSWER, OLDEST_LEFT_OUT, SHORTENED, TOO_LONG, WHOLE, DataError

FATES = [WHOLE, TOO_LONG, SHORTENED, EMPTY_ANSWER, OLDEST_LEFT_OUT]


def dataset(fates: list[str] = FATES) -> Dataset:
    ids = [[1, 2, 7, 3], [0], [1, 2, 3, 4], [0], [1, 7, 2]][: len(fates)]
    columns = {"input_ids": ids, "labels": ids, "attention_mask": [[1] * len(row) for row in ids]}
    return Dataset.from_dict({**columns, "fate": fates, "place": [f"a.jsonl:{i}" for i in range(1, len(fates) + 1)]})


def order(epoch: int, grouped: bool, count: int = 103, batch_size: int = 10) -> list[int]:
    lengths = np.arange(count) % 17
    sampler = EpochOrder(lengths, batch_size=batch_size, seed=3, grouped=grouped, current_epoch=lambda: epoch)
    assert len(sampler) == count
    return list(sampler)


def test_only_rows_that_are_kept_are_numbered():
    rows = NumberedRows(dataset(), name="dataset", cutoff_len=4)
    assert [rows[i]["input_ids"] for i in range(len(rows))] == [[1, 2, 7, 3], [1, 2, 3, 4], [1, 7, 2]]
    assert [rows[i]["sample_id"] for i in range(3)] == [0, 1, 2]
    assert [rows[i]["ended"] for i in range(3)] == [True, False, True]
    assert rows.lengths.tolist() == [4, 4, 3]
    assert "fate" not in rows[0]


def test_every_row_that_is_not_whole_is_counted_in_the_log(caplog):
    NumberedRows(dataset(), name="dataset", cutoff_len=4)
    assert "3 of 5 rows were longer than cutoff_len=4: 2 are cut, 1 left out" in caplog.text
    assert "1 too long (first: a.jsonl:2)" in caplog.text
    assert "1 of 5 rows teach nothing and are left out: 1 empty answer (first: a.jsonl:4)" in caplog.text


def test_data_of_which_nothing_is_left_is_refused():
    with pytest.raises(DataError, match="eval: none of 2 rows is left: 2 too long .*raise cutoff_len=4"):
        NumberedRows(dataset([TOO_LONG] * 2), name="eval", cutoff_len=4)
    with pytest.raises(ValueError, match="not tokenised by coda_posttrain; remove tokenized_path"):
        NumberedRows(dataset().remove_columns("fate"), name="dataset", cutoff_len=4)


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
