"""OptimizerSteps: forward, backward, guard, clipping and step, of one or several micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_fp.loop.loop_precision import LoopPrecision
from lightning_fp.loop.steps.joint_optimizer import as_one
from lightning_fp.stepping.gradients import calls_closure_once, clip_by_norm, gradient_norm
from lightning_fp.stepping.guard import Guard

ComputeLoss = Callable[[Any], Tensor]
"""From a micro-batch to its loss, a scalar."""

Heard = Callable[[], object]


class OptimizerSteps:
    """Makes optimizer steps.

    Args:
        precision: the formats and the base.
        model: what is trained, with its wrappers.
        optimizers: what steps, all together.
        clip_norm: largest norm of all gradients together; None clips nothing.
    """

    def __init__(
        self,
        precision: LoopPrecision,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        clip_norm: float | None,
    ) -> None:
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, got {clip_norm}; None clips nothing")
        self.precision, self.model, self.clip_norm = precision, model, clip_norm
        self.optimizers = tuple(optimizers)
        """All there are."""
        self.optimizer = as_one(self.optimizers)
        """All of them as one."""
        precision.connect([self.optimizer])
        self.guard = Guard(scaler=precision.base.scaler)
        self.left_out = False
        """Whether the last step was left out, as far as the host knows."""
        self.after_backward: list[Heard] = []
        """Told when a backward is done."""
        self.named: Heard = lambda: None
        """Told that a step is left out, while its gradients are there."""
        self.micro_batches = 0
        """Of the last step."""
        self.backward: Callable[[Tensor], object] = torch.Tensor.backward

    def losses(
        self,
        compute_loss: ComputeLoss,
        micro_batches: Sequence[Any],
        *,
        before: Callable[[int], object] = lambda _: None,
    ) -> list[Tensor]:
        """Forward and backward of all micro-batches.

        Args:
            compute_loss: see `ComputeLoss`.
            micro_batches: of one step.
            before: told the index of each micro-batch, before its forward.

        Returns:
            Each micro-batch's loss over their number, detached.

        Raises:
            ValueError: if a loss is no scalar, or has no gradient.
        """
        made: list[Tensor] = []
        self.micro_batches = len(micro_batches)
        last = self.micro_batches - 1
        for index, batch in enumerate(micro_batches):
            before(index)
            with self._synchronised(index == last):
                with self.precision.training_forward():
                    loss = compute_loss(self.precision.input(batch))
                    check_loss(loss)
                loss = loss / (last + 1)
                if index == 0:
                    self.optimizer.zero_grad()
                self.run_backward(loss)
            made.append(loss.detach())
        return made

    def run_backward(self, loss: Tensor) -> None:
        """Backward of a loss in its scale, of a forward in `training_forward`."""
        try:
            with self.precision.precision_map.attention_context():
                self.backward(self.precision.base.scaler.scaled(loss))
        finally:
            self.precision.backward_done()
        for hear in self.after_backward:
            hear()

    @contextmanager
    def _synchronised(self, on: bool) -> Generator[None, None, None]:
        """DDP exchanges gradients with the last micro-batch of a step."""
        inner = ddp_of(self.model)
        with nullcontext() if on or inner is None else inner.no_sync():
            yield

    # -- the optimizer's step -------------------------------------------------------------------

    def step(self, closure: Callable[[], Any], *, inside: bool | None = None) -> Any:
        """The optimizer's step, under the eyes of the guard.

        Args:
            closure: runs forward and backward, if that is not done yet.
            inside: whether the optimizer runs the closure itself; None: if it may want it again.

        Returns:
            What the closure returned.
        """
        kept: list[Any] = []

        def keeping() -> Any:
            kept.append(closure())
            return kept[-1]

        self.left_out = False
        guard, optimizer = self.guard, self.optimizer
        # The optimizer's later passes are at other weights: the first one's loss is the step's.
        if guard.passes(optimizer):
            optimizer.step(keeping)
            return kept[0] if kept else None
        guard.guarded(
            optimizer,
            keeping,
            self._clip,
            inside=not calls_closure_once(optimizer) if inside is None else inside,
            left_out=self._hear,
        )
        return kept[0] if kept else None

    def _hear(self, skip: bool) -> None:
        self.left_out = True
        if skip:
            self.named()

    @torch.no_grad()
    def _clip(self) -> Tensor:
        """The norm of all gradients before clipping."""
        if self.clip_norm is None:
            return gradient_norm(self.optimizer)
        return clip_by_norm(self.optimizer, self.clip_norm)


def ddp_of(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP within a model's wrappers."""
    found = (m for m in model.modules() if isinstance(m, DistributedDataParallel))
    return next(found, None)


def check_loss(loss: Any) -> None:
    """Refuse what backward cannot be called on.

    Raises:
        ValueError: naming what came instead.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"compute_loss must return a scalar tensor, got {got}; take its mean")
    if not loss.requires_grad:
        raise ValueError(
            "compute_loss must return a loss with a gradient, got one that requires none; compute"
            " it from the model's output, outside of torch.no_grad()"
        )
