"""Keys and values of a batch of canvases, and the columns that a cached forward pass computes anew.

In a bidirectional model every committed token changes the keys and values of all others, so reusing them is an
approximation; `scoring` decides when to refresh. Prefix and dual caching are from Fast-dLLM
(https://arxiv.org/abs/2505.22618).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Columns(NamedTuple):
    """The columns of each row that a forward pass computes."""

    index: Tensor
    """(R, W) int64; rows with fewer columns repeat their first one, which computes the same numbers twice."""

    valid: Tensor
    """(R, W) bool: False at the repetitions."""

    slot: Tensor
    """(R, T) int64: where a column stands in `index`; meaningless for columns that are not in it."""

    @classmethod
    def of(cls, wanted: Tensor) -> "Columns":
        """From a (R, T) bool mask with at least one column in each row."""
        count = wanted.sum(dim=1)
        order = wanted.int().argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
        valid = torch.arange(order.shape[1], device=wanted.device) < count[:, None]
        return cls(torch.where(valid, order, order[:, :1]), valid, wanted.long().cumsum(dim=1) - 1)

    def take(self, x: Tensor) -> Tensor:
        """Gather (R, T) values into (R, W)."""
        return x.gather(1, self.index)


class CanvasCache:
    """Keys and values of all rows of a canvas; the attention layers call `update`.

    It has the one method of transformers' `Cache` that the layers use, and knows by itself where they write.
    """

    def __init__(self, num_rows: int, length: int):
        self.num_rows, self.length = num_rows, length
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.rows: Tensor | None = None
        self.columns: Tensor | None = None

    def bind(self, rows: Tensor | None, columns: Tensor | None) -> "CanvasCache":
        """Say what the next forward pass computes: `rows` (R,) or None for all, `columns` (R, W) or None for all."""
        self.rows, self.columns = rows, columns
        return self

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store fresh keys and values (R, H_kv, W, D) and give those of the whole rows (R, H_kv, T, D)."""
        return self._update(self.keys, keys, layer_idx), self._update(self.values, values, layer_idx)

    def _update(self, store: dict[int, Tensor], fresh: Tensor, layer_idx: int) -> Tensor:
        if layer_idx not in store:
            shape = (self.num_rows, fresh.shape[1], self.length, fresh.shape[3])
            store[layer_idx] = fresh.new_zeros(shape)
        stored = store[layer_idx]
        whole = stored if self.rows is None else stored.index_select(0, self.rows)  # (R, H_kv, T, D)
        if self.columns is None:
            whole.copy_(fresh)
        else:
            where = self.columns[:, None, :, None].expand(-1, fresh.shape[1], -1, fresh.shape[3])
            whole.scatter_(2, where, fresh)
        if self.rows is not None:
            stored.index_copy_(0, self.rows, whole)
        return whole

    def refit(self, source: list[int], length: int) -> None:
        """Keep the rows `source`, in this order, at another length; -1 makes an empty row."""
        self.num_rows, self.length = len(source), length
        kept = [i for i, place in enumerate(source) if place >= 0]
        taken = [source[i] for i in kept]
        for store in (self.keys, self.values):
            for layer_idx, old in store.items():
                new = old.new_zeros(self.num_rows, old.shape[1], length, old.shape[3])
                width = min(length, old.shape[2])
                new[kept, :, :width] = old[taken, :, :width]
                store[layer_idx] = new

    def adopt(self, other: "CanvasCache", rows: Tensor, source: Tensor) -> None:
        """Take over rows `source` of another cache as rows `rows` of this one."""
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for layer_idx, tensor in theirs.items():
                mine[layer_idx].index_copy_(0, rows, tensor.index_select(0, source))
