"""The noised batch of each step, prepared one step ahead in a thread.

A batch is a pure function of (configuration, step), so what was prepared ahead and never used leaves no trace.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from CoDALanguageModel.attention_coda import Visibility, places, widening
from CoDALanguageModel.noise import Blocks, DoubledRows, NoisedRows, deal_levels

from ..config import RunConfig
from ..data.mixture import Mixture
from ..noise.masking import TokenFacts, noise_samples, noise_samples_by_blocks
from .annealing import visible_ahead

Batch = dict[str, np.ndarray]


def batch_of(rows: NoisedRows, t: Tensor, *, global_batch_size: int) -> Batch:
    """What a step is given of some rows of its global batch.

    Returns:
        `noised_ids` (B, T) int64; `labels` (B, T) int64, the clean id where masked and -100 elsewhere;
        `loss_weights` (B,) float32, `1 / (t * global_batch_size * T)`; `position_ids` (B, T) int64, from 0 in
        each segment, 0 at padding; `segment_ids` (B, T) int64, 0 at padding; `t` (B,) float32.

        The sum of weighted cross-entropies over all processes and micro-batches is the loss of the report (equation 6,
        weight 1/t over B * T of the global batch): its denominator is a constant, so parts add up without
        communication, and S2's padding makes a row count less rather than the other tokens more.
    """
    levels, segment_ids = t.numpy(), rows.segment_ids.numpy()
    return {
        "noised_ids": rows.noised_ids.numpy(),
        "labels": rows.labels.numpy(),
        "loss_weights": (1.0 / (levels.astype(np.float64) * global_batch_size * segment_ids.shape[1])).astype(
            np.float32
        ),
        "position_ids": places(rows.segment_ids).masked_fill(rows.segment_ids == 0, 0).numpy(),
        "segment_ids": segment_ids,
        "t": levels,
    }


def batch_of_doubled(rows: DoubledRows, *, global_batch_size: int) -> Batch:
    """What a step is given of some rows by blocks, B' of them: one, or two with complementary masks, per row of data.

    Returns:
        `noised_ids` (B', 2 T) int64, the noisy and the clean copy; `labels` (B', T), or (B', 2 T) where the clean copy
        is scored too; `loss_weights` of the shape of `labels`, float32, over the denominator of `batch_of`;
        `position_ids` and `segment_ids` (B', 2 T) int64, and the integers that make the latter a rule of
        `attention_coda`. Shapes do not depend on the size of the blocks.
    """
    denominator = global_batch_size * (rows.input_ids.shape[1] // 2)
    return {
        "noised_ids": rows.input_ids.numpy(),
        "labels": rows.labels.numpy(),
        "loss_weights": (rows.weights.double() / denominator).float().numpy(),
        "position_ids": rows.position_ids.numpy(),
        "segment_ids": rows.visibility.segment.numpy(),
        **rule_arrays(rows.visibility),
    }


def rule_arrays(rule: Visibility) -> Batch:
    """What makes `segment_ids` a rule, by name; (B, T) int each."""
    return {name: fact.numpy() for name, fact in rule._asdict().items() if name != "segment"}


class Batches:
    """The rows that this process feeds into the steps of a run. Step s reads samples `[s * B, (s + 1) * B)`."""

    def __init__(
        self,
        config: RunConfig,
        mixture: Mixture,
        *,
        rows: Sequence[int],
        num_steps: int,
        tokens: TokenFacts,
        blocks: Blocks | None = None,
    ) -> None:
        self._config, self._mixture, self._rows, self._num_steps = config, mixture, rows, num_steps
        self._tokens, self._blocks = tokens, blocks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[Batch]] | None = None

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that the first sample of `step` belongs to."""
        return step * self._config.global_batch_size // self._mixture.num_samples

    def progress(self, step: int) -> float:
        """The finished share of the run before `step`, in [0, 1)."""
        return step / self._num_steps

    def visible_ahead(self, step: int) -> int | None:
        """How many later tokens a token sees; None when all of them. See `annealing`."""
        num_steps = self._config.model.attention_annealing_steps
        return visible_ahead(step, num_steps=num_steps, seq_len=self._config.seq_len)

    def blocks(self, step: int) -> Blocks | None:
        """The blocks of a step; None for a model of full attention."""
        if self._blocks is None:
            return None
        return self._blocks._replace(size=self._config.blocks.size_at(step, self._blocks.size))

    def make(self, step: int) -> Batch:
        """Read and noise this process's rows of one step; see `batch_of` and `batch_of_doubled` for the arrays.

        While attention widens there are three more, which make `segment_ids` a rule of `attention_coda`.
        """
        size, seed, masking = self._config.global_batch_size, self._config.seed, self._config.masking
        ids = [step * size + row for row in self._rows]
        t = deal_levels(seed, step, size, masking.t_min)[list(self._rows)]
        samples, settings = (
            self._mixture.samples(ids),
            {
                "seed": seed,
                "strategies": masking.at(self.progress(step), self.epoch(step)),
                "span_lengths": masking.span_lengths,
                "tokens": self._tokens,
            },
        )
        blocks = self.blocks(step)
        if blocks is not None:
            doubled = noise_samples_by_blocks(samples, ids, t, blocks=blocks, t_min=masking.t_min, **settings)
            return batch_of_doubled(doubled, global_batch_size=size)
        rows = noise_samples(samples, ids, t, **settings)
        batch = batch_of(rows, t, global_batch_size=size)
        ahead = self.visible_ahead(step)
        if ahead is not None:
            batch |= rule_arrays(widening(rows.segment_ids, torch.full((len(ids),), ahead)))
        return batch

    def get(self, step: int) -> Batch:
        """The batch of `step`; starts preparing the next one."""
        ahead = self._ahead
        batch = ahead[1].result() if ahead is not None and ahead[0] == step else self.make(step)
        if step + 1 < self._num_steps:
            self._ahead = (step + 1, self._thread.submit(self.make, step + 1))
        return batch

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(cancel_futures=True)


def split_rows(batch: Batch, num_parts: int) -> list[Batch]:
    """The batch in `num_parts` equal runs of rows."""
    num_rows = len(batch["noised_ids"])
    assert num_rows % num_parts == 0, f"{num_rows} rows do not split into {num_parts} parts"
    size = num_rows // num_parts
    return [{name: array[i * size : (i + 1) * size] for name, array in batch.items()} for i in range(num_parts)]
