"""Which tokens may come out of a row, and how their scores are changed before one is chosen."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from .configuration_coda import token_ids
from .errors import UserError
from .generation_config_coda import DiffusionGenerationConfig


class Vocabulary:
    """Which tokens may come out, and how their scores are changed before one is chosen.

    Raises:
        UserError: no token may come out.
    """

    def __init__(self, config: DiffusionGenerationConfig, vocab_size: int, processors: Sequence[Any]):
        banned = {config.mask_token_id, *(config.suppress_tokens or ())}
        if config.pad_token_id is not None and config.pad_token_id not in token_ids(config.eos_token_id):
            banned.add(config.pad_token_id)
        self.banned = sorted(banned)
        self.bias = {int(token): float(value) for token, value in (config.logit_bias or {}).items()}
        self.penalties = float(config.presence_penalty), float(config.frequency_penalty)
        self.num_ids = config.num_token_ids
        self._banned: Tensor | None = None
        self.processors = LogitsProcessorList(processors)
        if config.repetition_penalty is not None:
            self.processors.insert(0, RepetitionPenaltyLogitsProcessor(penalty=float(config.repetition_penalty)))
        excluded = banned | {token for token, value in self.bias.items() if value == -math.inf}
        num_ids = min(config.num_token_ids or vocab_size, vocab_size)
        self.excluded = frozenset(excluded | set(range(num_ids, vocab_size)))
        """Ids that cannot come out, whatever the model gives."""
        if len(excluded) >= num_ids and excluded.issuperset(range(num_ids)):
            raise UserError(
                f"no token may come out: suppress_tokens and logit_bias exclude all of the {num_ids} ids of the "
                "vocabulary"
            )
        self.key: Hashable = (
            tuple(self.banned),
            tuple(self.bias.items()),
            self.num_ids,
            config.repetition_penalty,
            self.penalties,
            tuple(map(id, processors)),
        )

    def apply(self, logits: Tensor, ids: Tensor, row: Tensor, filled: Tensor) -> Tensor:
        """Change fresh logits (N, V) of positions in rows `row` (N,) of the canvases `ids` (R, width).

        `filled` (R, T) are the tokens of these rows that decoding has committed, and -1 elsewhere.

        Biases and bans are written into `logits`; a processor may give another tensor.
        """
        if self._banned is None or self._banned.device != logits.device:
            self._banned = torch.tensor(self.banned, device=logits.device)
            self._biased = torch.tensor(list(self.bias), dtype=torch.long, device=logits.device)
            self._biases = torch.tensor(list(self.bias.values()), device=logits.device)
        if self.bias:
            logits[:, self._biased] += self._biases.to(logits)
        if any(self.penalties):
            presence, frequency = self.penalties
            counts = torch.zeros(len(filled), logits.shape[1], device=logits.device)
            counts.scatter_add_(1, filled.clamp(min=0), (filled >= 0).float())
            logits -= (presence * (counts > 0) + frequency * counts).to(logits)[row]
        if self.processors:
            logits = self.processors(ids[row], logits)
        logits[:, self._banned] = -torch.inf
        logits[:, self.num_ids :] = -torch.inf
        return logits
