"""Validation loss: held-out rows under noise that is the same at every evaluation and in every run."""

from collections.abc import Sequence

from .batches import Batch
from .config import RunConfig
from .masking import MaskingConfig, noise_batch
from .mixture import Mixture

NOISE_SEED = 0
"""Fixed, so that losses of runs with different seeds or masking compare."""


class Evaluation:
    """The held-out batches of a run, for one process. Noise is plain: no prefix, truncation or spans."""

    def __init__(self, config: RunConfig, *, rows: Sequence[int], mask_token_id: int, pad_token_id: int) -> None:
        """Open the held-out shards.

        Raises:
            ValueError: they cannot be read.
        """
        assert config.evaluation.data is not None, "EvaluationConfig checks that data is given"
        self._config, self._rows = config, rows
        self._token_ids = {"mask_token_id": mask_token_id, "pad_token_id": pad_token_id}
        self._mixture = Mixture(config.evaluation.data, seq_len=config.seq_len, seed=NOISE_SEED)
        whole_batches = self._mixture.num_samples // config.global_batch_size
        self.num_batches = max(1, min(config.evaluation.batches, whole_batches))

    def batch(self, index: int) -> Batch:
        """Batch ``index`` of ``num_batches``: the same arrays whenever it is asked for."""
        size = self._config.global_batch_size
        ids = [index * size + row for row in self._rows]
        return noise_batch(
            [self._mixture.sample(i) for i in ids],
            ids,
            config=MaskingConfig(t_min=self._config.masking.t_min),
            seed=NOISE_SEED,
            step=index,
            progress=0.0,
            epoch=0,
            rows=self._rows,
            global_batch_size=size,
            **self._token_ids,
        )
