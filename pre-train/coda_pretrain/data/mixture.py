"""Order: which row of which source is sample number i of a run, as a pure function of (seed, i).

Nothing is stored and nothing is consumed, so any number of readers, on any number of hosts, resumes at any sample
exactly, and prefetching cannot disturb a position. Not here: bytes on disk (`shards`), noise (`masking`).
"""

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from CoDALanguageModel.errors import UserError

from ..places import Place, is_url, place_of
from .shards import TokenShards

logger = logging.getLogger(__name__)

FEISTEL_ROUNDS = 6
REQUESTS = 16  # to a store at once
MASK_64 = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One folder of token shards and how much of the mixture it is."""

    path: str
    """Folder written by `python -m coda_pretrain data`, relative to `data.root`, or an fsspec URL of one."""

    weight: float | None = None
    """Share of the samples, relative to the other sources' weights (token counts, percentages, ...). Give it for all
    sources or for none; without weights each source counts in proportion to its size."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UserError: the path is empty or the weight is not positive.
        """
        if not self.path:
            raise UserError("data.sources.path must name a folder of token shards, got an empty string")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise UserError(f"data.sources.weight must be positive (leave a source out instead), got {self.weight}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The sources of a run and the length of an epoch."""

    sources: tuple[SourceConfig, ...]
    """Folders of token shards, all made with one tokenizer."""

    root: str | None = None
    """Folder or fsspec URL (gs://, s3://, ...) that relative source paths start from; null is the working directory."""

    epoch_samples: int | None = None
    """Samples in an epoch; by default the rows of all sources together, so that unweighted sources are read exactly
    once. With weights, a small source is read more than once in an epoch and a large one less than once."""

    cache: str | None = None
    """Local folder for copies of shards behind URLs: each is copied when first needed and verified by its hash, and
    needs as much room as the sources. Null reads rows straight from the store, without copies."""

    verify: bool = False
    """Read all shards when a run starts or goes on, in each of its processes, and compare their hashes; their sizes are
    always compared."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UserError: no source, weights for only some of them, the same path twice, or a non-positive epoch.
        """
        object.__setattr__(self, "sources", tuple(self.sources))
        if not self.sources:
            raise UserError("data.sources must list at least one folder of token shards, got none")
        unweighted = [source.path for source in self.sources if source.weight is None]
        if unweighted and len(unweighted) < len(self.sources):
            raise UserError(f"data.sources.weight must be given for all sources or for none; missing for {unweighted}")
        paths = [source.path for source in self.sources]
        if len(set(paths)) < len(paths):
            raise UserError(f"data.sources.path must name each folder once, got {paths}")
        if self.epoch_samples is not None and self.epoch_samples < 1:
            raise UserError(f"data.epoch_samples must be at least 1, got {self.epoch_samples}")


class Sample(NamedTuple):
    """One packed row."""

    input_ids: np.ndarray  # (T,) int32: clean tokens
    segment_ids: np.ndarray  # (T,) int32: 1.. for the documents of the row, 0 for padding at its end


class SourceShare(NamedTuple):
    """What one source contributes to an epoch."""

    path: str
    rows: int  # rows of seq_len tokens the source holds
    requested_share: float  # of the samples of an epoch, in [0, 1]
    epoch_samples: int  # samples of an epoch that come from this source
    achieved_share: float  # epoch_samples over all samples of an epoch
    passes_per_epoch: float  # epoch_samples / rows


def permuted_index(index: int, size: int, key: int) -> int:
    """Place of `index` in a pseudo-random permutation of `range(size)` chosen by `key`, in constant memory.

    A balanced Feistel network over the next even number of bits, walked along its cycle until it lands inside
    (Black and Rogaway, 2002, "Ciphers with arbitrary finite domains"). The round function is the finaliser of
    SplitMix64 (Steele et al., 2014).
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & half_mask
        for round_number in range(FEISTEL_ROUNDS):
            mixed = (right + key + (round_number + 1) * 0x9E3779B97F4A7C15) & MASK_64
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK_64
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & half_mask)
        index = left << half_bits | right
        if index < size:
            return index


def split_by_weight(total: int, weights: list[float]) -> list[int]:
    """Whole numbers that add up to `total` in proportion to `weights`, each within 1 of its share.

    The method of largest remainders; equal remainders favour the earlier weight.
    """
    shares = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def source_place(root: str | None, path: str) -> Place:
    """Where a source lies: a URL and an absolute path stand for themselves, others are below `root`."""
    if is_url(path) or not root:
        return place_of(path)
    return place_of(root) / path if is_url(root) else Path(root) / path


class Mixture:
    """All sources of a run in one endless order.

    Epoch e holds samples `[e * num_samples, (e + 1) * num_samples)`: a fresh pseudo-random interleaving in which
    each source has exactly its number of samples. A source is read in passes, each a fresh permutation of its rows, and
    a pass continues in the next epoch: at the end of any epoch, how often two rows of a source were read differs by at
    most 1.

    Attributes:
        num_samples: samples in an epoch.
        shares: what each source contributes, requested and achieved.
        tokenizer: the tokenizer facts that all sources share, from their manifests.
    """

    def __init__(self, config: DataConfig, *, seq_len: int, seed: int) -> None:
        """Open the sources.

        Args:
            config: sources, weights, length of an epoch.
            seq_len: tokens in a sample (T).
            seed: names the order.

        Raises:
            UserError: `seq_len` is below 2, a source cannot be read, the sources' tokenizers differ, or an epoch is
                too short to give each source a sample.
        """
        if seq_len < 2:
            raise UserError(f"seq_len must be at least 2, got {seq_len}")
        self.seq_len, self.seed, self._verifies = seq_len, seed, config.verify
        places = [source_place(config.root, source.path) for source in config.sources]
        self._sources = [TokenShards(place, config.cache) for place in places]
        self._has_remote = any(source.is_remote for source in self._sources)
        self._check_tokenizers()
        self.tokenizer: dict[str, Any] = self._sources[0].tokenizer
        rows = [source.num_rows(seq_len) for source in self._sources]
        weights = [float(n if s.weight is None else s.weight) for s, n in zip(config.sources, rows, strict=True)]
        self.num_samples = config.epoch_samples or sum(rows)
        counts = split_by_weight(self.num_samples, weights)
        self.shares = [
            SourceShare(source.path, n, weight / sum(weights), count, count / self.num_samples, count / n)
            for source, n, weight, count in zip(config.sources, rows, weights, counts, strict=True)
        ]
        for share in self.shares:
            if not share.epoch_samples:
                raise UserError(
                    f"data.sources: {share.path} gets no sample in an epoch of {self.num_samples} (its share is "
                    f"{share.requested_share:.2g}); give it a larger weight or set data.epoch_samples higher"
                )
            logger.info(
                "%s: %d of %d samples per epoch, %.4f of them (asked for %.4f), %.2f passes over its %d rows",
                share.path,
                share.epoch_samples,
                self.num_samples,
                share.achieved_share,
                share.requested_share,
                share.passes_per_epoch,
                share.rows,
            )
        self._first_slots = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def identities(self) -> dict[str, dict[str, Any]]:
        """`TokenShards.identity` of each source, by its path as the configuration names it.

        Raises:
            UserError: `DataConfig.verify` is set, and a shard is not what its manifest recorded.
        """
        for source in self._sources if self._verifies else ():
            source.verify()
        return {share.path: source.identity() for share, source in zip(self.shares, self._sources, strict=True)}

    def _check_tokenizers(self) -> None:
        first = self._sources[0]
        for source in self._sources[1:]:
            if source.tokenizer != first.tokenizer:
                raise UserError(
                    f"data.sources must be made with one tokenizer, but {source.folder} has {source.tokenizer} "
                    f"and {first.folder} has {first.tokenizer}"
                )

    def locate(self, index: int) -> tuple[int, int]:
        """Source number and row number of sample `index` (any non-negative integer).

        Raises:
            UserError: `index` is negative.
        """
        if index < 0:
            raise UserError(f"index must be at least 0, got {index}")
        epoch, place = divmod(index, self.num_samples)
        slot = permuted_index(place, self.num_samples, self._key("epoch", epoch))
        source = int(np.searchsorted(self._first_slots, slot, side="right")) - 1
        share = self.shares[source]
        read_before = epoch * share.epoch_samples + slot - int(self._first_slots[source])
        source_pass, place = divmod(read_before, share.rows)
        return source, permuted_index(place, share.rows, self._key("pass", source, source_pass))

    def _key(self, name: str, *indices: int) -> int:
        """64 bits that choose a permutation."""
        text = ":".join(map(str, ("mixture", name, self.seed, *indices)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def sample(self, index: int) -> Sample:
        """Sample number `index` of the run: a pure function of (seed, index) and of the shards.

        Raises:
            UserError: `index` is negative.
        """
        source, row = self.locate(index)
        return Sample(*self._sources[source].read(row * self.seq_len, self.seq_len))

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        """Several samples in the given order; rows behind URLs are requested at once."""
        if not self._has_remote:
            return [self.sample(index) for index in indices]
        with ThreadPoolExecutor(REQUESTS, thread_name_prefix="rows") as pool:
            return list(pool.map(self.sample, indices))
