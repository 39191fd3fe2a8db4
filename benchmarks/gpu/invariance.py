"""Are a row's tokens the same alone and in company on this device? A measurement: the shares are reported as found."""

from typing import Any

import torch
from generation import prompts

from CoDALanguageModel import CoDALanguageModel

from .section import Section

REGIMES: dict[str, dict[str, Any]] = {
    "exact": {},
    "block-causal, cached": {},
    "dual cache": {"kv_cache": "dual", "block_length": 8},
    "threshold 0.9": {"threshold": 0.9},
}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.95},
}
ALONE = 6
"""Rows that are also decoded one by one: the first ones of each company."""


def invariance(section: Section) -> None:
    """Share of rows, and of tokens, that come out the same alone and in a padded batch."""
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 4, "head_dim": 64}
    alone, company, new = (2, (2, 3), 8) if section.is_tiny else (ALONE, (8, 32), 32)
    for dtype in (torch.bfloat16, torch.float32):
        full = section.model(dtype, **shape)
        by_blocks = section.model(dtype, **shape, **({} if section.is_tiny else BLOCKS))
        if section.is_tiny:
            by_blocks.config.attention, by_blocks.config.block_size = "block_causal", 8
        lengths = [16 + 37 * i % 96 for i in range(max(company))]
        rows = [prompts(full, 1, length, seed=length) for length in lengths]
        scores_alone_and_in_company(section, full, rows[:8])
        for regime in section.some(list(REGIMES)):
            model = by_blocks if regime.startswith("block-causal") else full
            for sampling, random in SAMPLING.items():
                given = {"max_new_tokens": new, "steps": new // 2, "eos_early_stop": False, **REGIMES[regime], **random}
                with section.measurement(dtype=str(dtype), regime=regime, sampling=sampling) as facts:
                    section.require(5)
                    single = [generated(model, [row], [i], given)[0] for i, row in enumerate(rows[:alone])]
                    for size in company:
                        together = generated(model, rows[:size], list(range(size)), given)
                        equal = torch.stack([a == b for a, b in zip(single, together, strict=False)])
                        facts[f"equal_rows_of_{len(equal)}_in_{size}"] = int(equal.all(dim=1).sum())
                        facts[f"equal_tokens_in_{size}"] = float(equal.float().mean())
                    again = generated(model, rows[: company[-1]], list(range(company[-1])), given)
                    facts["equal_when_repeated"] = float((again == together).float().mean())
        del full, by_blocks, model


BLOCKS = {"attention": "block_causal", "block_size": 8}


def batch_of(model: CoDALanguageModel, rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the left, and their attention mask."""
    width = max(row.shape[1] for row in rows)
    pad = model.config.pad_token_id
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=pad) for row in rows])
    mask = torch.tensor([[0] * (width - row.shape[1]) + [1] * row.shape[1] for row in rows])
    return ids.to(model.device), mask.to(model.device)


def generated(
    model: CoDALanguageModel, rows: list[torch.Tensor], seeds: list[int], settings: dict[str, Any]
) -> torch.Tensor:
    """(B, new) tokens of the answers."""
    ids, mask = batch_of(model, rows)
    return model.diffusion_generate(ids, mask, seed=seeds, **settings)[:, -settings["max_new_tokens"] :].cpu()


@torch.no_grad()
def scores_alone_and_in_company(section: Section, model: CoDALanguageModel, rows: list[torch.Tensor]) -> None:
    """How far the scores of a row's last position move by company and padding, which is what tokens hang on."""
    with section.measurement(what="scores", dtype=str(model.dtype)) as facts:
        ids, mask = batch_of(model, rows)
        together = model(ids, attention_mask=mask).logits[:, -1].float()
        alone = torch.cat([model(row.to(model.device)).logits[:, -1] for row in rows]).float()
        facts["largest_difference"] = float((alone - together).abs().max())
        facts["relative_difference"] = float((alone - together).norm() / alone.norm())
