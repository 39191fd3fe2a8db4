"""Rows and their order: samples that know their index, the order of an epoch, and the collator.

Not here: reading and tokenising (`rows`), noise (`curriculum`).
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from CoDALanguageModel.diffusion import named_rng
from CoDALanguageModel.errors import UserError

from .records import KEPT, OLDEST_LEFT_OUT, PROMPT_TOO_LONG, SHORTENED, TOO_LONG, WHOLE, DataError, fates

logger = logging.getLogger(__name__)

SCAN_BATCH = 10_000
GROUPED_BATCHES = 50
"""Batches whose rows are sorted together by length: more saves padding, fewer keeps the order more random."""


class NumberedRows(Dataset):
    """The rows that are trained on, with their index as `sample_id` and whether they are complete (`ended`).

    Args:
        rows: what `RowProcessor` made: `input_ids`, `attention_mask`, `labels`, `fate`, `place`.
        name: how errors call it, e.g. the setting that named it.
        cutoff_len: longest row, in tokens.

    Raises:
        UserError: the rows were tokenised by something else.
        DataError: no row is left.
    """

    def __init__(self, rows: Any, *, name: str, cutoff_len: int):
        if not {"fate", "place"} <= set(rows.column_names):
            raise UserError(f"{name}: these rows were not tokenised by coda_posttrain; remove tokenized_path")
        self.rows = rows.remove_columns(["fate", "place"])
        found = list(fates(rows))
        self.sample_ids = np.array([i for i, (fate, _) in enumerate(found) if fate in KEPT], dtype=np.int64)
        report_fates(name, found, cutoff_len)
        self.lengths = row_lengths(rows)[self.sample_ids]
        self.ended = np.array([found[i][0] != SHORTENED for i in self.sample_ids], dtype=bool)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[int(self.sample_ids[index])], "sample_id": index, "ended": bool(self.ended[index])}


def report_fates(name: str, found: Sequence[tuple[str, str]], cutoff_len: int) -> None:
    """Say in the log what became of the rows that are not whole, with the place of the first of each kind.

    Args:
        name: the setting that named the data.
        found: fate and place of every row.
        cutoff_len: longest row, in tokens.

    Raises:
        DataError: no row is left.
    """
    first: dict[str, str] = {}
    for fate, place in found:
        first.setdefault(fate, place)
    counts = Counter(fate for fate, _ in found)
    told = {fate: f"{count} {fate} (first: {first[fate]})" for fate, count in counts.items() if fate != WHOLE}
    long = [fate for fate in (SHORTENED, OLDEST_LEFT_OUT, TOO_LONG, PROMPT_TOO_LONG) if fate in counts]
    invalid = [fate for fate in told if fate not in long]
    num_long, num_left_out = sum(counts[fate] for fate in long), sum(counts[fate] for fate in long if fate not in KEPT)
    if long:
        logger.warning(
            "%s: %d of %d rows were longer than cutoff_len=%d: %d are cut, %d left out: %s",
            name, num_long, len(found), cutoff_len, num_long - num_left_out, num_left_out,
            ", ".join(told[fate] for fate in long),
        )  # fmt: skip
    if invalid:
        logger.warning(
            "%s: %d of %d rows teach nothing and are left out: %s",
            name, sum(counts[fate] for fate in invalid), len(found), ", ".join(told[fate] for fate in invalid),
        )  # fmt: skip
    if not any(fate in KEPT for fate in counts):
        remedy = f"; raise cutoff_len={cutoff_len}" if long else ""
        raise DataError(f"{name}: none of {len(found)} rows is left: {', '.join(told.values()) or 'no data'}{remedy}")


def row_lengths(rows: Any) -> np.ndarray:
    """Length of each row, in tokens."""
    columns = rows.select_columns(["input_ids"]).with_format("arrow")
    lengths = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(columns), SCAN_BATCH):
        ids = columns[start : start + SCAN_BATCH]["input_ids"].combine_chunks()
        lengths.append(np.diff(ids.offsets.to_numpy()).astype(np.int64))
    return np.concatenate(lengths)


class RowCollator:
    """LLaMA-Factory's collator, and the two facts of a row that it does not know.

    Args:
        collate: the collator that pads `input_ids`, `attention_mask` and `labels`.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]):
        self.collate = collate

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad rows into tensors; adds `sample_id` (B,) int64 and `ended` (B,) bool."""
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
