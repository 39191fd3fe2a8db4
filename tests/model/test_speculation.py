"""Facts of the errors that a choice bears."""

import pytest
import torch

from CoDALanguageModel.candidates import propose
from CoDALanguageModel.orders import ORDERS
from CoDALanguageModel.speculation import doubts


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("width", [0.3, 3.0, 30.0])
def test_an_error_of_the_logits_moves_confidences_by_no_more_than_their_sensitivity(alg, width):
    generator = torch.Generator().manual_seed(0)
    logits = width * torch.randn(400, 50, generator=generator, dtype=torch.float64)
    error = 1e-3
    noise = error * (2 * torch.rand(400, 50, generator=generator, dtype=torch.float64) - 1)
    before = propose(logits, ORDERS[alg], extra=doubts)
    margin, sensitivity = before.extra
    after = propose(logits + noise, ORDERS[alg])
    safe = margin > error
    assert safe.any()
    assert torch.equal(before.tokens[safe], after.tokens[safe])
    moved = (after.confidence - before.confidence).abs()[safe]
    assert (moved <= 1.01 * error * sensitivity[safe] + 1e-6).all()
    assert (sensitivity[safe] * error).max() > 1e-7, "the bound says nothing"
