"""Facts of the columns that are computed anew and of the store of keys and values."""

import torch

from CoDALanguageModel.cache import CanvasCache, Columns


def test_columns_are_gathered_in_order_and_short_rows_repeat_their_first():
    wanted = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 0, 0]]).bool()
    columns = Columns.of(wanted)
    assert columns.index.tolist() == [[1, 3, 4], [2, 2, 2]]
    assert columns.valid.tolist() == [[True, True, True], [True, False, False]]
    for row, column in wanted.nonzero().tolist():
        assert columns.index[row, columns.slot[row, column]] == column
    assert columns.take(torch.arange(10).view(2, 5)).tolist() == [[1, 3, 4], [7, 7, 7]]


def test_the_store_keeps_what_a_pass_does_not_compute():
    cache = CanvasCache(3, 4)
    whole = torch.randn(3, 2, 4, 5)
    keys, _ = cache.bind(None, None).update(whole, whole, 0)
    assert torch.equal(keys, whole)
    fresh = torch.randn(1, 2, 2, 5)
    keys, _ = cache.bind(torch.tensor([1]), torch.tensor([[0, 3]])).update(fresh, fresh, 0)
    assert torch.equal(keys[0, :, [0, 3]], fresh[0])
    assert torch.equal(keys[0, :, [1, 2]], whole[1, :, [1, 2]])
    keys, _ = cache.bind(torch.tensor([0, 2]), torch.tensor([[1], [1]])).update(whole[:2, :, :1], whole[:2, :, :1], 0)
    assert torch.equal(keys[:, :, [0, 2, 3]], whole[[0, 2]][:, :, [0, 2, 3]])


def test_a_row_can_be_taken_over_from_another_cache():
    mine, other = CanvasCache(2, 3), CanvasCache(1, 3)
    a, b = torch.randn(2, 1, 3, 4), torch.randn(1, 1, 3, 4)
    mine.bind(None, None).update(a, a, 0)
    other.bind(None, None).update(b, b, 0)
    mine.adopt(other, torch.tensor([1]), torch.tensor([0]))
    assert torch.equal(mine.keys[0][1], b[0])
    assert torch.equal(mine.keys[0][0], a[0])
