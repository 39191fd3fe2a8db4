"""Decay groups, averages, restored state, and the same numbers as the libraries' rules."""

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from coda_pretrain.config import OptimizerConfig
from coda_pretrain.devices.config import HardwareConfig
from coda_pretrain.devices.torch_backend import TorchBackend
from coda_pretrain.train.optim import build_optimizer, move_averages, set_step_count, set_update_numbers, state_tensors


def parameters():
    torch.manual_seed(0)
    return {"weight": nn.Parameter(torch.randn(4, 6)), "norm.weight": nn.Parameter(torch.randn(6))}


class TracedOnCpu(TorchBackend):
    """Steps as the xla backend makes them, on the CPU: numbers of a step are tensors."""

    traces_steps = True

    def host_scalars(self, values):
        return [torch.tensor(value) for value in values]


RULES = [("adamw", TorchBackend), ("adamw", TracedOnCpu), ("adafactor", TorchBackend), ("adafactor", TracedOnCpu)]


class Rule:
    """An optimizer with the backend that it was built for."""

    def __init__(self, named, backend=TorchBackend, **options):
        config = OptimizerConfig(**{"learning_rate": 0.1, **options})
        self.backend = backend(HardwareConfig())
        self.optimizer = build_optimizer(config, named, self.backend)

    def update(self, count, learning_rate=0.1):
        set_update_numbers(self.optimizer, learning_rate, count=count, placement=self.backend)
        self.optimizer.step()


def give_gradients(named, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(("name", "backend"), RULES)
def test_rules_give_the_updates_of_the_libraries_under_a_changing_rate(name, backend):
    ours, theirs = parameters(), parameters()
    rule = Rule(ours, backend, name=name, weight_decay=0.1)
    groups = [
        {"params": [theirs["weight"]], "weight_decay": 0.1},
        {"params": [theirs["norm.weight"]], "weight_decay": 0.0},
    ]
    if name == "adamw":
        reference = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95))
    else:
        reference = Adafactor(groups, lr=0.1, scale_parameter=False, relative_step=False, warmup_init=False)
    for step in range(4):
        for named in (ours, theirs):
            give_gradients(named, step)
        for group in reference.param_groups:
            group["lr"] = 0.1 / (1 + step)
        rule.update(step + 1, 0.1 / (1 + step))
        reference.step()
    for key, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[key], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("name", "backend"), RULES)
def test_state_and_count_restore_the_next_update(name, backend):
    first, second = parameters(), parameters()
    rule, copied = Rule(first, backend, name=name), Rule(second, backend, name=name)
    for step in range(3):
        give_gradients(first, step)
        rule.update(step + 1)
    with torch.no_grad():
        for key, parameter in second.items():
            parameter.copy_(first[key])
    for key, tensor in state_tensors(copied.optimizer, second).items():
        tensor.copy_(state_tensors(rule.optimizer, first)[key])
    set_step_count(copied.optimizer, 3)
    for named, each in ((first, rule), (second, copied)):
        give_gradients(named, 9)
        each.update(4)
    for key, parameter in first.items():
        assert torch.equal(parameter, second[key])


@pytest.mark.parametrize(("name", "backend"), RULES)
def test_norms_and_biases_do_not_decay(name, backend):
    named = parameters()
    before = {key: parameter.detach().clone() for key, parameter in named.items()}
    rule = Rule(named, backend, name=name, weight_decay=0.5)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    rule.update(1, 0.01)
    torch.testing.assert_close(named["weight"].detach(), before["weight"] * (1 - 0.5 * 0.01))
    assert torch.equal(named["norm.weight"], before["norm.weight"])


def test_the_state_of_adafactor_is_a_row_and_a_column():
    named = parameters()
    state = state_tensors(Rule(named, name="adafactor").optimizer, named)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert shapes == {"weight.exp_avg_sq_row": (4,), "weight.exp_avg_sq_col": (6,), "norm.weight.exp_avg_sq": (6,)}


def test_averages_start_at_the_weights_and_follow_them():
    named = parameters()
    rule = Rule(named, ema_decay=0.75)
    averages = {key: t for key, t in state_tensors(rule.optimizer, named).items() if key.endswith(".ema")}
    start = {key: parameter.detach().clone() for key, parameter in named.items()}
    assert {key: tuple(tensor.shape) for key, tensor in averages.items()} == {
        "weight.ema": (4, 6),
        "norm.weight.ema": (6,),
    }
    give_gradients(named, 0)
    rule.update(1)
    move_averages(rule.optimizer, 0.75)
    for key, parameter in named.items():
        torch.testing.assert_close(averages[f"{key}.ema"], 0.75 * start[key] + 0.25 * parameter.detach())
