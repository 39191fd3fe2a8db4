"""A model, its update rule and its step, put together as every run has them."""

from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

from ..config import RunConfig
from ..devices.backend import Backend
from .optim import build_optimizer
from .step import StepFunctions


class Assembly(NamedTuple):
    """What changes weights."""

    parameters: dict[str, nn.Parameter]
    """By name; placed by the backend."""

    optimizer: Optimizer
    functions: StepFunctions


def assemble(config: RunConfig, model: nn.Module, backend: Backend) -> Assembly:
    """Place the model and build what trains it.

    Args:
        config: the run.
        model: a `CoDALanguageModel`, built on the CPU in float32 after `backend.prepare_kernel`.
        backend: the machine.
    """
    model = backend.prepare_model(model, z_loss=config.optimizer.z_loss)
    parameters = dict(model.named_parameters())
    optimizer = build_optimizer(config.optimizer, parameters, backend)
    functions = StepFunctions(
        model,
        optimizer,
        max_grad_norm=config.max_grad_norm,
        ema_decay=config.optimizer.ema_decay,
        doubled=config.by_blocks,
        backend=backend,
    )
    return Assembly(parameters, optimizer, functions)
