"""Keys and values that forward passes reuse: of a batch of canvases, and of texts that only grow.

In a bidirectional model every committed token changes the keys and values of all others, so reusing those of a canvas
is an approximation; `scoring` decides when to refresh. Prefix and dual caching are from Fast-dLLM
(https://arxiv.org/abs/2505.22618). Where attention goes by blocks, those of finished blocks are exact: they lie in
pages (Kwon et al. 2023, https://arxiv.org/abs/2309.06180).
"""

import heapq
import itertools
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


PAGE = 16
"""Tokens of a page: a text wastes half of one on average."""

SLACK = 8
"""The pool grows by one in so many of its pages more than it must."""


class CachedText:
    """A text of a `PagedCache`, which alone reads and writes it."""

    def __init__(self, pages: list[int], length: int):
        self.pages, self.length = pages, length


class PagedCache:
    """Keys and values of texts that only grow, in pages; the attention layers call `update`.

    Memory follows the tokens of all texts, not their number times the longest. Texts that begin alike can share those
    pages. A pass whose graph is kept for a gradient cannot use it.
    """

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        """Of each layer (pages * PAGE, H_kv, D). What pads texts to one length is read in page 0, which stays zero."""
        self._texts: set[CachedText] = set()
        self._num_owners = [1]  # of each page; page 0 is nobody's and never free
        self._free: list[int] = []  # a heap, so that the end of the pool is what falls free

    @property
    def num_bytes(self) -> int:
        """Memory of all pages of all layers."""
        return sum(x.nbytes for store in (self.keys, self.values) for x in store.values())

    def open(self, parent: CachedText | None = None, length: int = 0) -> CachedText:
        """Begin a text, empty or with the first `length` tokens of another one.

        Whole pages are shared with the parent, which may grow and leave as if alone; the rest of a page is copied.

        Raises:
            ValueError: the parent is not as long, or has left.
        """
        text = CachedText([], length)
        if length:
            if parent not in self._texts or not 0 < length <= parent.length:
                raise ValueError(f"the first {length} tokens are asked of a text that does not hold them")
            text.pages, rest = parent.pages[: length // PAGE], length % PAGE
            for page in text.pages:
                self._num_owners[page] += 1
            if rest:
                text.pages += self._take(1)
                old, new = parent.pages[length // PAGE] * PAGE, text.pages[-1] * PAGE
                for store in (self.keys, self.values):
                    for pool in store.values():
                        with torch.inference_mode(pool.is_inference()):  # of the passes, and not of who opens a text
                            pool[new : new + rest] = pool[old : old + rest]
        self._texts.add(text)
        return text

    def close(self, text: CachedText) -> None:
        """Let a text go: its pages that no other one shares are free, and where it pays their memory is given back.

        Raises:
            KeyError: the text has left already.
        """
        self._texts.remove(text)
        for page in text.pages:
            self._num_owners[page] -= 1
            if not self._num_owners[page]:
                heapq.heappush(self._free, page)
        num_pages = 1 + max(page for page, owners in enumerate(self._num_owners) if owners)
        if not self._texts:
            self.keys, self.values = {}, {}
            self._resize(1)
        elif num_pages <= len(self._num_owners) // 2:
            self._resize(num_pages)

    def length(self, text: CachedText) -> int:
        """Tokens whose keys and values are stored, with those that the pass last bound keeps."""
        return text.length

    def bind(self, texts: list[CachedText], keep: Tensor) -> "PagedCache":
        """Say what the next forward pass computes: columns behind the stored tokens of texts.

        A text may stand in several rows if one of them at most keeps something.

        Args:
            texts: of the R rows.
            keep: (R, W) bool, the columns that are appended to their text, in this order; the others are forgotten.

        Raises:
            ValueError: a text has left, or two rows would append to one.
        """
        before, counts = [text.length for text in texts], keep.sum(dim=1).tolist()
        growing = [(text, count) for text, count in zip(texts, counts, strict=True) if count]
        if not self._texts.issuperset(texts) or len({text for text, _ in growing}) < len(growing):
            raise ValueError("each row needs a text that is open, and a text grows in one row of a pass")
        missing = [-(-(text.length + count) // PAGE) - len(text.pages) for text, count in growing]
        pages = iter(self._take(sum(missing)))
        for (text, count), number in zip(growing, missing, strict=True):
            text.length += count
            text.pages += itertools.islice(pages, number)
        self.key_lengths = torch.tensor(before, device=keep.device)
        """(R,) int64, stored tokens of each text before the pass."""
        num_pages = max((len(text.pages) for text in texts), default=0)
        padded = [text.pages + [0] * (num_pages - len(text.pages)) for text in texts]
        table = torch.tensor(padded, dtype=torch.long, device=keep.device)  # (R, P)
        place = torch.arange(max(before, default=0), device=keep.device)
        slots = table[:, place // PAGE] * PAGE + place % PAGE
        self._read = torch.where(place < self.key_lengths[:, None], slots, 0).T.flatten()  # (S * R,), S the longest
        row, column = keep.nonzero(as_tuple=True)
        place = self.key_lengths[row] + keep.long().cumsum(dim=1)[row, column] - 1
        self._write = row, column, table[row, place // PAGE] * PAGE + place % PAGE  # (N,) each
        return self

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store what is kept, and give what the pass attends to.

        Args:
            keys: (R, H_kv, W, D), of all columns of the pass.
            values: the same shape.
            layer_idx: of the layer.
            *args: other arguments of transformers' caches.
            **kwargs: the same.

        Returns:
            Keys and values, (R, H_kv, S + W, D): first the stored ones, with zeros behind the end of a text up to the
            longest one's S, then those of the columns.
        """
        return self._update(self.keys, keys, layer_idx), self._update(self.values, values, layer_idx)

    def _update(self, store: dict[int, Tensor], fresh: Tensor, layer_idx: int) -> Tensor:
        num_rows, num_heads, width, head_dim = fresh.shape
        if layer_idx not in store:
            store[layer_idx] = fresh.new_zeros(len(self._num_owners) * PAGE, num_heads, head_dim)
        pool = store[layer_idx]
        row, column, slots = (x.to(fresh.device) for x in self._write)
        pool.index_copy_(0, slots, fresh[row, :, column])
        stored = len(self._read)
        if not stored:
            return fresh
        # Places before rows, so that the stored ones are a part that they can be gathered into.
        whole = fresh.new_empty(stored + width * num_rows, num_heads, head_dim)
        torch.index_select(pool, 0, self._read.to(fresh.device), out=whole[:stored])
        whole = whole.view(-1, num_rows, num_heads, head_dim)
        whole[-width:] = fresh.permute(2, 0, 1, 3)
        return whole.permute(1, 2, 0, 3)

    def _take(self, count: int) -> list[int]:
        """Free pages, after the pool has grown if it must."""
        needed = len(self._num_owners) - len(self._free) + count
        if needed > len(self._num_owners):
            self._resize(needed + needed // SLACK)
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._num_owners[page] = 1
        return pages

    def _resize(self, num_pages: int) -> None:
        self._num_owners = (self._num_owners + [0] * num_pages)[:num_pages]
        self._free = [page for page, owners in enumerate(self._num_owners) if not owners]
        for store in (self.keys, self.values):
            for layer_idx, old in store.items():
                store[layer_idx] = old.new_zeros(num_pages * PAGE, *old.shape[1:])
                kept = min(len(old), num_pages * PAGE)
                store[layer_idx][:kept] = old[:kept]
