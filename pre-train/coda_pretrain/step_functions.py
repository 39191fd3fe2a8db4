"""What happens on the device in one optimizer step, as four functions that a backend may trace.

They read no value of a device tensor, so each is one static graph: gradients of a part of the batch, their norm, the
update, and the loss alone. The norm is its own function because the host looks at it before it allows the update.
"""

from typing import NamedTuple

from torch import Tensor, nn, no_grad
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from .backends.base import Backend
from .batches import Batch

MODEL_INPUTS = ("position_ids", "segment_ids", "labels", "loss_weights")
DEVICE_ARRAYS = ("noised_ids", *MODEL_INPUTS)


class Gradients(NamedTuple):
    """The result of the backward passes of one step, as the host sees it."""

    loss: float  # of this process's rows
    norm: float  # over all weights and processes
    device_norm: Tensor


class StepFunctions:
    """Model and optimizer of a run, bound to a backend."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, max_grad_norm: float | None, backend: Backend
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._parameters = list(model.parameters())
        self._max_grad_norm, self._backend = max_grad_norm, backend
        self._accumulate = backend.compile(self._accumulate_gradients)
        self._norm = backend.compile(self._gradient_norm)
        self._update = backend.compile(self._update_weights)
        self._evaluate = backend.compile(self._loss_without_gradient)

    def gradients(self, parts: list[Batch]) -> Gradients:
        """Add up the gradients of the parts of a batch, and wait for the numbers."""
        losses = [self._accumulate(self._put(part)) for part in parts]
        norm = self._norm()
        loss = sum(float(loss) for loss in losses)
        return Gradients(loss, float(norm.full_tensor() if isinstance(norm, DTensor) else norm), norm)

    def update(self, gradients: Gradients) -> None:
        """Clip, change the weights and clear the gradients."""
        self._update(gradients.device_norm)

    def loss(self, parts: list[Batch]) -> float:
        """The loss of this process's rows, without a gradient."""
        losses = [self._evaluate(self._put(part)) for part in parts]
        return sum(float(loss) for loss in losses)

    def clear_gradients(self) -> None:
        """Set the gradients to zero, keeping their memory."""
        for parameter in self._parameters:
            self._backend.clear_gradient(parameter)

    def _put(self, part: Batch) -> dict[str, Tensor]:
        return self._backend.put({name: part[name] for name in DEVICE_ARRAYS})

    def _forward(self, batch: dict[str, Tensor]) -> Tensor:
        with self._backend.autocast():
            return self.model(batch["noised_ids"], **{name: batch[name] for name in MODEL_INPUTS}).loss

    def _accumulate_gradients(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self._forward(batch)
        (loss * self._backend.gradient_scale).backward()
        return loss.detach()

    def _loss_without_gradient(self, batch: dict[str, Tensor]) -> Tensor:
        with no_grad():
            return self._forward(batch)

    def _gradient_norm(self) -> Tensor:
        return get_total_norm([p.grad for p in self._parameters if p.grad is not None], foreach=False)

    def _update_weights(self, norm: Tensor) -> None:
        if self._max_grad_norm is not None:
            clip_grads_with_norm_(self._parameters, self._max_grad_norm, norm, foreach=False)
        self.optimizer.step()
        self.clear_gradients()
