"""Attention that widens from causal to full, for a run that starts from an autoregressive model.

A token sees all tokens before it and the next ``n`` ones, with n growing linearly from 0 to the whole row, so that the
first step attends as the weights were trained to. After Gong et al. 2024 (https://arxiv.org/abs/2410.17891), who let n
grow at random.
"""

import torch
from torch import Tensor


def visible_ahead(step: int, *, num_steps: int | None, seq_len: int) -> int | None:
    """How many later tokens a token sees at ``step``; None when all of them.

    Args:
        step: from 0.
        num_steps: ``model.attention_annealing_steps``; None is full attention from the start.
        seq_len: tokens per row.
    """
    if num_steps is None or step >= num_steps:
        return None
    return step * seq_len // num_steps


def widened_mask(segment_ids: Tensor, ahead: Tensor) -> Tensor:
    """Who may attend to whom.

    Args:
        segment_ids: (B, T) int.
        ahead: (B,) int, see ``visible_ahead``.

    Returns:
        (B, 1, T, T) bool, True where the query (third axis) may attend to the key.
    """
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    near = index[None, :] - index[:, None] <= ahead[:, None, None]  # (B, T, T)
    return (near & (segment_ids[:, :, None] == segment_ids[:, None, :]))[:, None]
