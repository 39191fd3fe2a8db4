"""Validation loss: held-out rows under noise that is the same at every evaluation and in every run."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from CoDALanguageModel.noise import Blocks, deal_levels

from ..config import RunConfig
from ..data.mixture import Mixture
from ..noise.masking import TokenFacts, noise_samples, noise_samples_by_blocks
from ..noise.strategies import MaskingConfig
from .batches import Batch, batch_of, batch_of_doubled

NOISE_SEED = 0
"""Fixed, so that losses of runs with different seeds or masking compare."""

MAX_BINS = 8
"""Parts of the noise levels that a loss is reported for."""


def held_out_identities(config: RunConfig) -> dict[str, dict[str, Any]]:
    """`Mixture.identities` of the held-out shards, as `evaluation.data`; empty for a run without evaluation.

    Raises:
        ValueError: they cannot be read.
    """
    data = config.evaluation.data
    if config.evaluation.every is None or data is None:
        return {}
    return {"evaluation.data": Mixture(data, seq_len=config.seq_len, seed=NOISE_SEED).identities()}


class Evaluation:
    """The held-out batches of a run, for one process. Noise is plain: no prefix, truncation or spans.

    The noise levels of all rows are one stratified draw, and rows of neighbouring levels share a batch, so that the
    loss of a batch is the loss of its part of [t_min, 1] and the mean over all batches is the loss itself. By blocks
    all blocks of a row have its level; masks are single ones, blocks are the model's from the first step on, and the
    loss is that of the noisy copy alone, so that runs compare whatever they add to it.
    """

    def __init__(
        self, config: RunConfig, *, rows: Sequence[int], tokens: TokenFacts, blocks: Blocks | None = None
    ) -> None:
        """Open the held-out shards.

        Raises:
            ValueError: they cannot be read.
        """
        assert config.evaluation.data is not None, "EvaluationConfig checks that data is given"
        self._config, self._rows, self._tokens = config, rows, tokens
        if blocks is not None:
            blocks = Blocks(blocks.size, autoregressive_weight=0.0 if blocks.is_joint else None)
        self._blocks = blocks
        self._mixture = Mixture(config.evaluation.data, seq_len=config.seq_len, seed=NOISE_SEED)
        whole_batches = self._mixture.num_samples // config.global_batch_size
        self.num_batches = max(1, min(config.evaluation.batches, whole_batches))
        num_rows = self.num_batches * config.global_batch_size
        self._levels = deal_levels(NOISE_SEED, 0, num_rows, config.masking.t_min)
        self._samples_by_level = torch.argsort(self._levels).tolist()

    def batch(self, index: int) -> Batch:
        """Batch `index` of `num_batches`: the same arrays whenever it is asked for."""
        size, plain = self._config.global_batch_size, MaskingConfig()
        samples = [self._samples_by_level[index * size + row] for row in self._rows]
        t = self._levels[samples]
        clean, settings = (
            [self._mixture.sample(sample) for sample in samples],
            {
                "seed": NOISE_SEED,
                "strategies": plain.at(0.0, 0),
                "span_lengths": plain.span_lengths,  # of a plain run, so that their validation noise is that of all
                "tokens": self._tokens,
            },
        )
        if self._blocks is not None:
            doubled = noise_samples_by_blocks(clean, samples, t, blocks=self._blocks, t_min=None, **settings)
            return batch_of_doubled(doubled, global_batch_size=size)
        return batch_of(noise_samples(clean, samples, t, **settings), t, global_batch_size=size)

    def losses(self, batch_losses: list[float]) -> dict[str, float]:
        """`eval_loss` and the loss of each part of the noise levels, such as `eval_loss_t0.00-0.25`.

        Args:
            batch_losses: over all processes, of each batch in order.
        """
        t_min = self._config.masking.t_min
        result = {"eval_loss": float(np.mean(batch_losses))}
        if self.num_batches == 1:
            return result
        for part in np.array_split(np.arange(self.num_batches), min(self.num_batches, MAX_BINS)):
            low, high = (t_min + (1 - t_min) * edge / self.num_batches for edge in (part[0], part[-1] + 1))
            result[f"eval_loss_t{low:.2f}-{high:.2f}"] = float(np.mean([batch_losses[i] for i in part]))
        return result
