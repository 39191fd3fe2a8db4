"""Rows and their order: samples that know their index, the order of an epoch, and the collator.

Not here: tokenising and templates (LLaMA-Factory), noise (``curriculum``).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from CoDALanguageModel.diffusion import named_rng

logger = logging.getLogger(__name__)

SCAN_BATCH = 10_000
GROUPED_BATCHES = 50
"""Batches whose rows are sorted together by length: more saves padding, fewer keeps the order more random."""


class NumberedRows(Dataset):
    """Tokenised rows that carry their index as ``sample_id`` and whether they end with their end token.

    Args:
        rows: a tokenised dataset of LLaMA-Factory with ``input_ids``, ``attention_mask``, ``labels``.
        name: how errors call it, e.g. the setting that named it.
        eos_token_id: the token that ends an answer.
        cutoff_len: length at which LLaMA-Factory cut the rows, in tokens.
        drop_cut: leave out the rows that were cut.

    Raises:
        ValueError: no row is left, or no row ends with the end token.
    """

    def __init__(self, rows: Any, *, name: str, eos_token_id: int, cutoff_len: int, drop_cut: bool):
        self.rows = rows
        lengths, ended = scan_ends(rows, eos_token_id)
        # A row that does not end with its end token was cut; an uncut row always ends with it.
        kept = np.flatnonzero(ended) if drop_cut else np.arange(len(lengths))
        num_cut = int((~ended).sum())
        if num_cut:
            logger.warning(
                "%s: %d of %d rows were longer than cutoff_len=%d and are %s",
                name, num_cut, len(lengths), cutoff_len, "left out" if drop_cut else "cut, without their end",
            )  # fmt: skip
        if not len(kept):
            raise ValueError(f"{name}: none of {len(lengths)} rows is left; raise cutoff_len={cutoff_len}")
        if not ended.any():
            raise ValueError(
                f"{name}: no row ends with the end token {eos_token_id}: the template does not fit the tokenizer, "
                f"or every row is longer than cutoff_len={cutoff_len}"
            )
        self.sample_ids = kept
        self.lengths = lengths[kept]
        self.ended = ended[kept]

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[int(self.sample_ids[index])], "sample_id": index, "ended": bool(self.ended[index])}


def scan_ends(rows: Any, eos_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Length of each row, in tokens, and whether the end token is among its last two tokens (ChatML adds a newline)."""
    lengths, ended = [], []
    columns = rows.select_columns(["input_ids"]).with_format("arrow")
    for start in range(0, len(columns), SCAN_BATCH):
        ids = columns[start : start + SCAN_BATCH]["input_ids"].combine_chunks()
        offsets = ids.offsets.to_numpy()
        tokens = ids.values.to_numpy()
        size = np.diff(offsets)
        last, before = tokens[offsets[1:] - 1], tokens[np.maximum(offsets[1:] - 2, 0)]
        lengths.append(size)
        ended.append((size > 1) & ((last == eos_token_id) | (before == eos_token_id)))
    if not lengths:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
    return np.concatenate(lengths).astype(np.int64), np.concatenate(ended)


class RowCollator:
    """LLaMA-Factory's collator, and the two facts of a row that it does not know.

    Args:
        collate: the collator that pads ``input_ids``, ``attention_mask`` and ``labels``.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]):
        self.collate = collate

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad rows into tensors; adds ``sample_id`` (B,) int64 and ``ended`` (B,) bool."""
        features = [dict(feature) for feature in features]
        sample_ids = torch.tensor([feature.pop("sample_id") for feature in features])
        ended = torch.tensor([feature.pop("ended") for feature in features])
        batch = self.collate(features)
        return {**batch, "sample_id": sample_ids, "ended": ended}


class EpochOrder(Sampler[int]):
    """A shuffled epoch, a pure function of (seed, epoch); optionally with rows of a batch about equally long.

    Args:
        lengths: length of each row, in tokens.
        batch_size: rows of a global batch.
        seed: names the order.
        grouped: put rows of similar length into the same batch.
        current_epoch: gives the epoch when an iteration starts, also one that resumes within an epoch.
    """

    def __init__(
        self, lengths: np.ndarray, *, batch_size: int, seed: int, grouped: bool, current_epoch: Callable[[], int]
    ):
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.grouped = grouped
        self.current_epoch = current_epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = named_rng("row-order", self.seed, self.current_epoch())
        order = rng.permutation(len(self.lengths))
        if not self.grouped:
            yield from order.tolist()
            return
        pool = self.batch_size * GROUPED_BATCHES
        batches = []
        for start in range(0, len(order), pool):
            chunk = order[start : start + pool]
            chunk = chunk[np.argsort(-self.lengths[chunk], kind="stable")]
            batches += [chunk[i : i + self.batch_size] for i in range(0, len(chunk), self.batch_size)]
        # A batch that is not full must stay last, or it would shift the borders of all that follow.
        full = [batch for batch in batches if len(batch) == self.batch_size]
        rest = [batch for batch in batches if len(batch) != self.batch_size]
        for index in rng.permutation(len(full)):
            yield from full[index].tolist()
        for batch in rest:
            yield from batch.tolist()
