"""State before the first step, decay groups, and the same numbers as the libraries' lazy state."""

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from coda_pretrain.backends.torch_backend import TorchBackend
from coda_pretrain.config import HardwareConfig, OptimizerConfig
from coda_pretrain.optim import build_optimizer, set_learning_rate, set_step_count, state_tensors


def parameters():
    torch.manual_seed(0)
    return {"weight": nn.Parameter(torch.randn(4, 6)), "norm.weight": nn.Parameter(torch.randn(6))}


def built(named, **options):
    config = OptimizerConfig(learning_rate=0.1, **options)
    return build_optimizer(config, named, TorchBackend(HardwareConfig()))


def give_gradients(named, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_explicit_state_gives_the_updates_of_lazy_state(name):
    ours, theirs = parameters(), parameters()
    optimizer = built(ours, name=name)
    if name == "adamw":
        reference = torch.optim.AdamW(theirs.values(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    else:
        reference = Adafactor(theirs.values(), lr=0.1, scale_parameter=False, relative_step=False, warmup_init=False)
    for step in range(4):
        for named in (ours, theirs):
            give_gradients(named, step)
        optimizer.step()
        reference.step()
    for key, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_state_and_count_restore_the_next_update(name):
    first = parameters()
    optimizer = built(first, name=name)
    for step in range(3):
        give_gradients(first, step)
        optimizer.step()
    second = parameters()
    copied = built(second, name=name)
    with torch.no_grad():
        for key, parameter in second.items():
            parameter.copy_(first[key])
    for key, tensor in state_tensors(copied, second).items():
        tensor.copy_(state_tensors(optimizer, first)[key])
    set_step_count(copied, 3)
    for named, rule in ((first, optimizer), (second, copied)):
        give_gradients(named, 9)
        rule.step()
    for key, parameter in first.items():
        assert torch.equal(parameter, second[key])


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_norms_and_biases_do_not_decay(name):
    named = parameters()
    before = {key: parameter.detach().clone() for key, parameter in named.items()}
    optimizer = built(named, name=name, weight_decay=0.5)
    set_learning_rate(optimizer, 0.01)
    for parameter in named.values():
        parameter.grad.zero_()
    optimizer.step()
    torch.testing.assert_close(named["weight"].detach(), before["weight"] * (1 - 0.5 * 0.01))
    assert torch.equal(named["norm.weight"], before["norm.weight"])


def test_the_state_of_adafactor_is_a_row_and_a_column():
    named = parameters()
    shapes = {key: tuple(tensor.shape) for key, tensor in state_tensors(built(named, name="adafactor"), named).items()}
    assert shapes == {"weight.exp_avg_sq_row": (4,), "weight.exp_avg_sq_col": (6,), "norm.weight.exp_avg_sq": (6,)}
