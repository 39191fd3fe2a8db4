"""The noised batch of each step, prepared one step ahead in a thread.

A batch is a pure function of (configuration, step), so what was prepared ahead and never used leaves no trace.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ..config import RunConfig
from ..data.mixture import Mixture
from ..noise.masking import noise_batch
from .annealing import visible_ahead

Batch = dict[str, np.ndarray]


class Batches:
    """The rows that this process feeds into the steps of a run. Step s reads samples ``[s * B, (s + 1) * B)``."""

    def __init__(
        self,
        config: RunConfig,
        mixture: Mixture,
        *,
        rows: Sequence[int],
        num_steps: int,
        mask_token_id: int,
        pad_token_id: int,
    ) -> None:
        self._config, self._mixture, self._rows, self._num_steps = config, mixture, rows, num_steps
        self._token_ids = {"mask_token_id": mask_token_id, "pad_token_id": pad_token_id}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[Batch]] | None = None

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that the first sample of ``step`` belongs to."""
        return step * self._config.global_batch_size // self._mixture.num_samples

    def progress(self, step: int) -> float:
        """The finished share of the run before ``step``, in [0, 1)."""
        return step / self._num_steps

    def visible_ahead(self, step: int) -> int | None:
        """How many later tokens a token sees; None when all of them. See ``annealing``."""
        num_steps = self._config.model.attention_annealing_steps
        return visible_ahead(step, num_steps=num_steps, seq_len=self._config.seq_len)

    def make(self, step: int) -> Batch:
        """Read and noise this process's rows of one step; see ``masking.noise_batch`` for the arrays.

        While attention widens there is one more, ``visible_ahead`` (B,).
        """
        size = self._config.global_batch_size
        ids = [step * size + row for row in self._rows]
        batch = noise_batch(
            self._mixture.samples(ids),
            ids,
            config=self._config.masking,
            seed=self._config.seed,
            step=step,
            progress=self.progress(step),
            epoch=self.epoch(step),
            rows=self._rows,
            global_batch_size=size,
            **self._token_ids,
        )
        ahead = self.visible_ahead(step)
        return batch if ahead is None else batch | {"visible_ahead": np.full(len(ids), ahead)}

    def get(self, step: int) -> Batch:
        """The batch of ``step``; starts preparing the next one."""
        ahead = self._ahead
        batch = ahead[1].result() if ahead is not None and ahead[0] == step else self.make(step)
        if step + 1 < self._num_steps:
            self._ahead = (step + 1, self._thread.submit(self.make, step + 1))
        return batch

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(cancel_futures=True)


def split_rows(batch: Batch, num_parts: int) -> list[Batch]:
    """The batch in ``num_parts`` equal runs of rows."""
    num_rows = len(batch["noised_ids"])
    assert num_rows % num_parts == 0, f"{num_rows} rows do not split into {num_parts} parts"
    size = num_rows // num_parts
    return [{name: array[i * size : (i + 1) * size] for name, array in batch.items()} for i in range(num_parts)]
