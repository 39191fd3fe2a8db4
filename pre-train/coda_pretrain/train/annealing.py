"""Attention that widens from causal to full, for a run that starts from an autoregressive model.

A token sees all tokens before it and the next `n` ones, with n growing linearly from 0 to the whole row, so that the
first step attends as the weights were trained to. After Gong et al. 2024 (https://arxiv.org/abs/2410.17891), who let n
grow at random. The rule itself is `CoDALanguageModel.attention_coda.widening`.
"""


def visible_ahead(step: int, *, num_steps: int | None, seq_len: int) -> int | None:
    """How many later tokens a token sees at `step`; None when all of them.

    Args:
        step: from 0.
        num_steps: `model.attention_annealing_steps`; None is full attention from the start.
        seq_len: tokens per row.
    """
    if num_steps is None or step >= num_steps:
        return None
    return step * seq_len // num_steps
