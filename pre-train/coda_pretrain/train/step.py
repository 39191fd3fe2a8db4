"""What happens on the devices in one optimizer step, as functions that a backend may trace.

Where steps are traced they read no value of a device tensor, so a step is one static graph: gradients, their norm, the
decision whether all is finite, and the update. With accumulation there are two: gradients of a part, and the rest.
Elsewhere the host looks at loss and norm before it allows the update, which saves a copy of weights and state.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn, no_grad
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from CoDALanguageModel.attention_coda import Visibility
from CoDALanguageModel.errors import UserError

from ..devices.backend import Backend
from .batches import Batch
from .optim import move_averages, set_update_numbers

logger = logging.getLogger(__name__)

MODEL_INPUTS = ("position_ids", "segment_ids", "labels", "loss_weights")
DEVICE_ARRAYS = ("noised_ids", *MODEL_INPUTS)
RULE_ARRAYS = Visibility._fields[1:]
"""(B, T) each, in a batch whose attention is not full."""


class StepResult(NamedTuple):
    """One step, as the host sees it."""

    loss: float  # of the global batch
    norm: float  # of the gradient, over all weights and processes, before clipping

    @property
    def is_finite(self) -> bool:
        """Whether the weights were changed; a step that is not finite leaves weights and optimizer state alone."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class StepFunctions:
    """Model and optimizer of a run, bound to a backend."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        max_grad_norm: float | None,
        ema_decay: float | None = None,
        doubled: bool = False,
        backend: Backend,
    ) -> None:
        """Bind them.

        Args:
            model: placed by the backend.
            optimizer: of its weights.
            max_grad_norm: see `RunConfig`.
            ema_decay: see `OptimizerConfig`.
            doubled: whether rows are `[noisy; clean]`.
            backend: the machine.
        """
        self._doubled = doubled
        self.model, self.optimizer = model, optimizer
        self._parameters = list(model.parameters())
        self._max_grad_norm, self._ema_decay, self._backend = max_grad_norm, ema_decay, backend
        self._whole_step = backend.compile(self._step_of_one_part)
        self._accumulate = backend.compile(self._accumulate_gradients)
        self._update = backend.compile(self._update_if_finite)
        self._evaluate = backend.compile(self._loss_without_gradient)
        self._compiled_shapes: dict[tuple[str, ...], dict[str, str]] = {}

    def step(
        self,
        parts: list[Batch],
        *,
        learning_rate: float,
        count: int,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> StepResult | None:
        """Change the weights once by the gradient of all parts of a batch, unless it is not finite.

        Args:
            parts: this process's rows, in equal parts that go through the model one after another.
            learning_rate: of this update.
            count: number of this update, from 1; skipped steps do not count.
            interrupted: asked between two parts whether the step is to be given up; its answer must be the same on
                every process.

        Returns:
            None when the step was given up: weights and optimizer state are those before it.

        Raises:
            UserError: the parts have other shapes or types than at the step before, which would compile another
                graph.
        """
        set_update_numbers(self.optimizer, learning_rate, count=count, placement=self._backend)
        if not self._backend.traces_steps:
            return self._step_under_control_of_the_host(parts, interrupted)
        known = len(self._compiled_shapes)
        batches = [self._put(part, "train") for part in parts]
        graphs = self._backend.compile_count() if len(self._compiled_shapes) == known else None
        if len(batches) == 1:
            losses, norm = self._whole_step(batches[0])
        else:
            self._allocate_gradients()
            losses = []
            for batch in batches:
                if losses and interrupted():
                    self._clear_gradients()
                    return None
                losses.append(self._accumulate(batch))
            norm = self._update(losses)
        result = StepResult(sum(float(loss) for loss in losses), float(norm))
        self._report_compilation(graphs, count)
        return result

    def trace(self, parts: list[Batch]) -> Iterator[tuple[str, list[Tensor]]]:
        """Trace the graphs of a step one after another without running them, for backends that trace.

        Yields:
            The name of a graph and its results, which have no values. Afterwards neither have the weights.
        """
        set_update_numbers(self.optimizer, 1.0, count=1, placement=self._backend)
        batch = self._put(parts[0], "train")
        if len(parts) == 1:
            losses, norm = self._step_of_one_part(batch)
            yield "train step", [*losses, norm, *self._tensors_of_the_update()]
            return
        self._allocate_gradients()
        results = [self._accumulate_gradients(batch), *self._gradients()]
        yield "gradients of a part", results
        results.clear()  # frees them before others are made
        for parameter in self._parameters:
            parameter.grad = None
        self._allocate_gradients()
        norm = self._update_if_finite(self._backend.host_scalars([0.0] * len(parts)))
        yield "update", [norm, *self._tensors_of_the_update(), *self._gradients()]

    def loss(self, parts: list[Batch]) -> float:
        """The loss of the global batch, without a gradient."""
        loss = sum(float(self._evaluate(self._put(part, "evaluation"))) for part in parts)
        return self._backend.all_reduce_sum([loss])[0]

    def _step_under_control_of_the_host(self, parts: list[Batch], interrupted: Callable[[], bool]) -> StepResult | None:
        loss = 0.0
        for i, part in enumerate(parts):
            if i and interrupted():
                self._clear_gradients()
                return None
            loss += float(self._accumulate(self._put(part, "train")))
        norm = self._gradient_norm()
        (loss,) = self._backend.all_reduce_sum([loss])
        result = StepResult(loss, float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        if result.is_finite:
            self._change_weights(norm)
        self._clear_gradients()
        return result

    def _put(self, part: Batch, graph: str) -> dict[str, Tensor]:
        arrays = {name: part[name] for name in (*DEVICE_ARRAYS, *RULE_ARRAYS) if name in part}
        # With the dimensions of the others: a vector cannot be split over two axes of a mesh.
        weights = part["loss_weights"]
        arrays["loss_weights"] = np.broadcast_to(weights.reshape(len(weights), -1), part["labels"].shape)
        batch = self._backend.to_device(arrays)
        if self._backend.traces_steps:
            shapes = {name: f"{list(tensor.shape)} {tensor.dtype}" for name, tensor in batch.items()}
            before = self._compiled_shapes.setdefault((graph, *shapes), shapes)  # a rule of attention is another graph
            changes = [
                f"{name} from {before[name]} to {shapes[name]}" for name in shapes if shapes[name] != before[name]
            ]
            if changes:
                raise UserError(
                    f"this batch would compile the {graph} graph again, since it changes {', '.join(changes)}; "
                    "every batch of a run must have the shapes of the first one"
                )
        return batch

    def _report_compilation(self, graphs_before: int | None, count: int) -> None:
        """Say that a step compiled although it should not have."""
        graphs = self._backend.compile_count()
        if graphs is not None and graphs_before is not None and 0 < graphs_before < graphs:
            logger.warning(
                "update %d compiled %d more graph(s), although the batch has the shapes and types of the first one: "
                "a Python number or a module's state differs from step to step, or the runtime resharded a "
                "weight; PT_XLA_DEBUG_LEVEL=2 names the line",
                count,
                graphs - graphs_before,
            )

    def _forward(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: batch[name] for name in MODEL_INPUTS}
        inputs["visibility"] = Visibility(batch["segment_ids"], *(batch.get(name) for name in RULE_ARRAYS))
        with self._backend.autocast():
            return self.model(batch["noised_ids"], doubled=self._doubled, return_dict=True, **inputs).loss

    def _accumulate_gradients(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self._forward(batch)
        (loss * self._backend.gradient_scale).backward()
        return loss.detach()

    def _loss_without_gradient(self, batch: dict[str, Tensor]) -> Tensor:
        with no_grad():
            return self._forward(batch)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _gradient_norm(self) -> Tensor:
        return get_total_norm(self._gradients(), foreach=False)

    def _change_weights(self, norm: Tensor) -> None:
        if self._max_grad_norm is not None:
            clip_grads_with_norm_(self._parameters, self._max_grad_norm, norm, foreach=False)
        self.optimizer.step()
        if self._ema_decay is not None:
            move_averages(self.optimizer, self._ema_decay)

    def _step_of_one_part(self, batch: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        losses = [self._accumulate_gradients(batch)]
        norm = self._change_if_finite(losses)
        for parameter in self._parameters:
            parameter.grad = None  # no memory is kept for gradients between steps
        return losses, norm

    def _update_if_finite(self, losses: list[Tensor]) -> Tensor:
        norm = self._change_if_finite(losses)
        self._clear_gradients()
        return norm

    @no_grad()
    def _change_if_finite(self, losses: list[Tensor]) -> Tensor:
        norm = self._gradient_norm()
        is_finite = torch.isfinite(torch.stack([norm, *losses])).all()
        tensors = list(self._tensors_of_the_update())
        before = [tensor.clone() for tensor in tensors]  # values of the graph: a copy is never made
        self._change_weights(norm)
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(is_finite, tensor, old))
        return norm

    def _tensors_of_the_update(self) -> Iterable[Tensor]:
        yield from self._parameters
        for parameter in self._parameters:
            yield from self.optimizer.state[parameter].values()

    def _clear_gradients(self) -> None:
        for parameter in self._parameters:
            self._backend.clear_gradient(parameter)

    def _allocate_gradients(self) -> None:
        """Zeros to add to, so that the first part of the first step is the graph of all later ones."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = self._backend.zeros(parameter, tuple(range(parameter.dim())))
