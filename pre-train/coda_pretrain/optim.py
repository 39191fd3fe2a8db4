"""The update rules, with state that exists before the first step and goes to and from a checkpoint by weight name.

Explicit state gives one device graph for every step, and lets a checkpoint be restored without taking a step first.
Counts of steps are not tensors of the checkpoint: all weights share one, which the trainer keeps.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers.optimization import Adafactor

from .backends.base import Backend
from .config import OptimizerConfig

DEFAULT_EPS = {"adamw": 1e-8, "adafactor": 1e-30}


def build_optimizer(config: OptimizerConfig, parameters: Mapping[str, nn.Parameter], backend: Backend) -> Optimizer:
    """The optimizer that ``config`` names, with all of its state in place and zeroed gradients.

    Weights of two or more dimensions decay; biases and norm weights do not. Gradients are allocated here and never
    freed, so that the first backward pass of a step adds to zeros as the later ones add to their sum.
    """
    groups = [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    eps = DEFAULT_EPS[config.name] if config.eps is None else config.eps
    if config.name == "adamw":
        # Traced steps need the count on the device: a Python number would be another constant in each step's graph.
        kernel = {"capturable": True, "foreach": False} if backend.capturable_optimizer else {"fused": True}
        optimizer: Optimizer = AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=eps, **kernel)
    else:
        optimizer = Adafactor(
            groups,
            lr=config.learning_rate,
            eps=(eps, 1e-3),  # the second is for scale_parameter, which is off
            clip_threshold=config.clip_threshold,
            decay_rate=config.decay_rate,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
    for parameter in parameters.values():
        every_dim = tuple(range(parameter.dim()))
        parameter.grad = backend.zeros(parameter, every_dim)
        optimizer.state[parameter] = _initial_state(config.name, parameter, backend)
    return optimizer


def _initial_state(name: str, parameter: nn.Parameter, backend: Backend) -> dict[str, Tensor | int]:
    dims = tuple(range(parameter.dim()))
    if name == "adamw":
        if backend.capturable_optimizer:
            step = backend.zeros(parameter, ())
        else:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": step, "exp_avg": backend.zeros(parameter, dims), "exp_avg_sq": backend.zeros(parameter, dims)}
    state: dict[str, Tensor | int] = {"step": 0, "RMS": 0}
    if parameter.dim() >= 2:
        state["exp_avg_sq_row"] = backend.zeros(parameter, dims[:-1])
        state["exp_avg_sq_col"] = backend.zeros(parameter, dims[:-2] + dims[-1:])
    else:
        state["exp_avg_sq"] = backend.zeros(parameter, dims)
    return state


def state_tensors(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The running averages, as ``NAME_OF_WEIGHT.KEY`` -> tensor; filling these tensors in place restores them."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
        if key.startswith("exp_avg")
    }


def set_step_count(optimizer: Optimizer, steps: int) -> None:
    """Tell every weight's state that ``steps`` updates have been made."""
    for state in optimizer.state.values():
        if isinstance(state["step"], Tensor):
            # Through a host tensor: a constant written on the device would be part of the next graph.
            state["step"].copy_(torch.tensor(float(steps)))
        else:
            state["step"] = steps


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set the rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
