"""The update rules, with state that exists before the first step and goes to and from a checkpoint by weight name.

Explicit state gives one device graph for every step, and lets a checkpoint be restored without taking a step first.
For the same reason the numbers that change from step to step (rate, bias corrections) enter the rules from the host:
the count of updates is no tensor of the checkpoint, all weights share one, which the trainer keeps.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import OptimizerConfig
from ..devices.backend import Placement

DEFAULT_EPS = {"adamw": 1e-8, "adafactor": 1e-30}


class Adafactor(Optimizer):
    """Shazeer and Stern 2018 (https://arxiv.org/abs/1804.04235, algorithms 4 and 5), with a given rate.

    No first moment and no relative step sizes. A matrix keeps the row and column means of its squared gradients, a
    vector all of them. The numbers of a step, `lr` and `decay`, are in the parameter groups.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Change every weight once."""
        assert closure is None, "the loss is never evaluated again"
        for group in self.param_groups:
            for parameter in group["params"]:
                self._change(parameter, self.state[parameter], group)

    def _change(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        rate, decay, gradient = group["lr"], group["decay"], parameter.grad
        assert gradient is not None, "every weight has a gradient when it is changed"
        square = gradient.square() + group["eps"]
        if parameter.dim() >= 2:
            row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            row.mul_(decay).add_(square.mean(dim=-1) * (1.0 - decay))
            column.mul_(decay).add_(square.mean(dim=-2) * (1.0 - decay))
            scale = (row / row.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.unsqueeze(-2).rsqrt()
        else:
            whole = state["exp_avg_sq"]
            whole.mul_(decay).add_(square * (1.0 - decay))
            scale = whole.rsqrt()
        update = scale * gradient
        root_mean_square = update.norm(2) / math.sqrt(update.numel())
        update = update / (root_mean_square / group["clip_threshold"]).clamp(min=1.0)
        if group["weight_decay"] != 0.0:
            parameter.mul_(1.0 - group["weight_decay"] * rate)
        parameter.sub_(update * rate)


class TracedAdamW(Optimizer):
    """Loshchilov and Hutter 2019 (https://arxiv.org/abs/1711.05101, algorithm 2), for steps that are traced.

    torch's own rule keeps a count for each weight on the device. Here the numbers of a step, `lr` and the bias
    corrections `first_total` and `second_total`, are in the parameter groups.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Change every weight once."""
        assert closure is None, "the loss is never evaluated again"
        for group in self.param_groups:
            first, second = group["betas"]
            rate = group["lr"] / group["first_total"]
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(gradient, 1.0 - first)
                square.mul_(second).addcmul_(gradient, gradient, value=1.0 - second)
                if group["weight_decay"] != 0.0:
                    parameter.mul_(1.0 - group["weight_decay"] * group["lr"])
                parameter.sub_(rate * mean / ((square / group["second_total"]).sqrt() + group["eps"]))


def build_optimizer(config: OptimizerConfig, parameters: Mapping[str, nn.Parameter], placement: Placement) -> Optimizer:
    """The optimizer that `config` names, with all of its state in place.

    Weights of two or more dimensions decay; biases and norm weights do not.
    """
    groups = [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    eps = DEFAULT_EPS[config.name] if config.eps is None else config.eps
    settings = {"lr": config.learning_rate, "eps": eps}
    optimizer: Optimizer
    if config.name == "adafactor":
        own = {"clip_threshold": config.clip_threshold, "decay_rate": config.decay_rate}
        optimizer = Adafactor(groups, {**settings, **own})
    elif placement.traces_steps:
        optimizer = TracedAdamW(groups, {**settings, "betas": config.betas})
    else:
        optimizer = torch.optim.AdamW(groups, betas=config.betas, fused=True, **settings)
    for parameter in parameters.values():
        optimizer.state[parameter] = _initial_state(config.name, parameter, placement)
        if config.ema_decay is not None:
            optimizer.state[parameter]["ema"] = placement.copy(parameter)
    set_update_numbers(optimizer, config.learning_rate, count=1, placement=placement)
    return optimizer


def _initial_state(name: str, parameter: nn.Parameter, placement: Placement) -> dict[str, Tensor]:
    dims = tuple(range(parameter.dim()))
    if name == "adamw":
        state = {"exp_avg": placement.zeros(parameter, dims), "exp_avg_sq": placement.zeros(parameter, dims)}
        if not placement.traces_steps:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return state
    if parameter.dim() >= 2:
        return {
            "exp_avg_sq_row": placement.zeros(parameter, dims[:-1]),
            "exp_avg_sq_col": placement.zeros(parameter, dims[:-2] + dims[-1:]),
        }
    return {"exp_avg_sq": placement.zeros(parameter, dims)}


def state_tensors(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The running averages, as `NAME_OF_WEIGHT.KEY` -> tensor; filling these tensors in place restores them.

    The averages of the squared gradients (and of the gradients) are there for every weight; `KEY` `ema` is the
    average of the weight itself, when `optimizer.ema_decay` is set.
    """
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
        if key != "step"
    }


def set_update_numbers(optimizer: Optimizer, learning_rate: float, *, count: int, placement: Placement) -> None:
    """Give the rule what changes with each update.

    Args:
        optimizer: of `build_optimizer`.
        learning_rate: of the next update.
        count: number of the next update, from 1; skipped steps do not count.
        placement: places the numbers.
    """
    for group in optimizer.param_groups:
        numbers = {"lr": learning_rate}
        if isinstance(optimizer, Adafactor):
            numbers["decay"] = 1.0 - count ** group["decay_rate"]
        elif isinstance(optimizer, TracedAdamW):
            first, second = group["betas"]
            numbers |= {"first_total": 1.0 - first**count, "second_total": 1.0 - second**count}
        group.update(zip(numbers, placement.host_scalars(list(numbers.values())), strict=True))


def set_step_count(optimizer: Optimizer, steps: int) -> None:
    """Tell a rule that counts by itself, torch's AdamW, that `steps` updates have been made."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(steps)


@torch.no_grad()
def move_averages(optimizer: Optimizer, decay: float) -> None:
    """Move the average of each weight towards the weight by `1 - decay`."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["ema"].lerp_(parameter, 1.0 - decay)
