"""One record of each optimizer step, made once; whatever a loss or a norm is needed for reads it.

A step is what lies between two changes of the count of optimizer steps: all its micro-batches, and
in manual optimization all optimizers that step within one training step.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class OptimizerStep:
    """What was seen of one optimizer's step."""

    grad_norm: Tensor | None
    """Norm of all its gradients before clipping; scalar on their device. inf or NaN if any is.
    None where nobody has computed it."""

    skipped: Tensor | None
    """Whether the step was left out; bool scalar, on the host unless the optimizer is fused. None
    where nobody leaves steps out."""

    hyperparameters: list[dict[str, Any]]
    """The plain numbers of each parameter group: lr, betas, weight_decay, ..."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step. Its tensors are on the device; nobody has waited for them."""

    step: int
    """Optimizer steps before it."""

    loss: Tensor | None
    """float32 scalar of this rank; None if the step had none. In automatic optimization the mean
    over its micro-batches. In manual optimization the sum of what `manual_backward` was given: what
    the step's gradients are the gradients of, over all optimizers, e.g. a generator's and a
    discriminator's."""

    optimizers: tuple[OptimizerStep, ...]
    """In the order in which they stepped."""

    seconds: float
    """Since the end of the step before."""

    @property
    def lr(self) -> float | None:
        """Learning rate of the first parameter group; None where no optimizer has any."""
        groups = self.optimizers[0].hyperparameters if self.optimizers else ()
        lr = groups[0].get("lr") if groups else None
        return None if lr is None else float(lr)

    @property
    def grad_norms(self) -> list[Tensor]:
        """Those that are known, one for each optimizer."""
        return [s.grad_norm for s in self.optimizers if s.grad_norm is not None]

    @property
    def skipped(self) -> list[Tensor]:
        """Where steps may be left out, whether each optimizer's was."""
        return [s.skipped for s in self.optimizers if s.skipped is not None]

    @property
    def grad_norm(self) -> Tensor | None:
        """Over all optimizers."""
        norms = self.grad_norms
        if len(norms) < 2:
            return norms[0] if norms else None
        return torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))


class StepRecorder:
    """Makes the record of a step from what is heard while it runs."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._losses: list[Tensor] = []
        self._given: list[Tensor] = []
        self._optimizers: list[OptimizerStep] = []
        self._mark = perf_counter()

    def begin(self, step: int) -> None:
        """A micro-batch begins.

        Args:
            step: optimizer steps done.
        """
        if self._step is None:
            self._step = step

    def backward(self, loss: Tensor) -> None:
        """In manual optimization: what `manual_backward` is given."""
        self._given.append(loss.detach().float().sum())

    def stepped(self, optimizer: OptimizerStep) -> None:
        """An optimizer has stepped, or is about to; what several know of it is put together."""
        self._optimizers.append(optimizer)

    def micro_batch(self, loss: Any, divided_by: int) -> None:
        """A micro-batch ends.

        Args:
            loss: what its training step returned as its loss; anything but a scalar is none.
            divided_by: the loss is that of the micro-batch over this number.
        """
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach().reshape(()).float() * divided_by)

    def end(self, step: int) -> StepRecord | None:
        """The record, if a step is over; to be asked at the end of each micro-batch.

        Args:
            step: optimizer steps done.
        """
        begun = self._step
        if begun is None or step == begun:
            return None
        losses, given, optimizers = self._losses, self._given, tuple(self._optimizers)
        self._step, self._losses, self._given, self._optimizers = None, [], [], []
        loss = torch.stack(losses).mean() if losses else None
        now = perf_counter()
        seconds, self._mark = max(0.0, now - self._mark), now  # no clock is quite monotonic
        return StepRecord(
            step=begun,
            loss=torch.stack(given).sum() if given else loss,
            optimizers=optimizers,
            seconds=seconds,
        )
