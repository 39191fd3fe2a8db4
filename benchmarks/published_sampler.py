"""The published sampler as a baseline: what CoDA's repository computes at each step, for one batch of equal prompts.

Faithful in cost and in choice: the LM head runs on every position at every step, logits are shifted by a copy, top-p
sorts the whole vocabulary for each masked row, steps that commit nothing still run the model, and nothing stops
early. One addition: mask, pad and undefined ids are excluded as in the project's sampler, so that tokens can be
compared.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def top_p_logits(logits: Tensor, top_p: float) -> Tensor:
    """Set logits outside of the nucleus to the smallest float, by sorting the vocabulary."""
    sorted_logits, sorted_indices = torch.sort(logits, descending=True)
    cumulative = torch.cumsum(F.softmax(sorted_logits, dim=-1), dim=-1)
    remove = cumulative > top_p
    remove[..., 1:] = remove[..., :-1].clone()
    remove[..., 0] = False
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, sorted_indices, remove)
    return logits.masked_fill(mask, torch.finfo(logits.dtype).min)


def sample_tokens(logits: Tensor, alg: str, temperature: float, top_p: float | None) -> tuple[Tensor, Tensor]:
    """Confidence and token of each masked row."""
    if temperature > 0:
        logits = logits / temperature
    if top_p is not None and top_p < 1:
        logits = top_p_logits(logits, top_p)
    probabilities = torch.softmax(logits, dim=-1)
    if temperature > 0:
        tokens = torch.distributions.Categorical(probs=probabilities).sample()
        confidence = torch.gather(probabilities, -1, tokens.unsqueeze(-1)).squeeze(-1)
    else:
        confidence, tokens = probabilities.max(dim=-1)
    if alg == "topk_margin":
        ordered, _ = torch.sort(probabilities, dim=-1, descending=True)
        confidence = ordered[:, 0] - ordered[:, 1]
    if alg == "entropy":
        confidence = torch.sum(probabilities * torch.log(probabilities + 1e-10), dim=-1)
    return confidence, tokens


@torch.no_grad()
def published_generate(
    model,
    inputs: Tensor,
    *,
    max_new_tokens: int,
    steps: int,
    alg: str = "entropy",
    temperature: float = 0.0,
    top_p: float | None = None,
    eps: float = 1e-3,
) -> Tensor:
    """Fill `max_new_tokens` masks behind (B, T) prompts in `steps` steps; gives the whole canvas."""
    config = model.config
    x = F.pad(inputs, (0, max_new_tokens), value=config.mask_token_id)
    timesteps = torch.linspace(1, eps, steps + 1, device=x.device)
    for i in range(steps):
        mask_index = x == config.mask_token_id
        logits = model(input_ids=x).logits
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        mask_logits = logits[mask_index].float()
        mask_logits[:, [config.mask_token_id, config.pad_token_id]] = -torch.inf
        mask_logits[:, config.num_token_ids :] = -torch.inf
        t, s = timesteps[i], timesteps[i + 1]
        confidence, tokens = sample_tokens(mask_logits, alg, temperature, top_p)
        num_masked = mask_index.sum() / mask_index.shape[0]
        count = int(num_masked * (1 - s / t)) if i < steps - 1 else int(num_masked)
        if count > 0:
            full_confidence = torch.full(x.shape, -torch.inf, dtype=confidence.dtype, device=x.device)
            full_confidence[mask_index] = confidence
            _, chosen = torch.topk(full_confidence, count)
            candidates = torch.full_like(x, config.mask_token_id)
            candidates[mask_index] = tokens
            rows = torch.arange(len(x), device=x.device)[:, None].expand_as(chosen)
            x[rows, chosen] = candidates[rows, chosen]
    return x
