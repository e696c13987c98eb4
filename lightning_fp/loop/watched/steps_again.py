"""StepsAgain: recorded steps of a plain loop, made once more with nobody hearing of them."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_fp.loop.batches import copied_to
from lightning_fp.loop.loop_precision import LoopPrecision
from lightning_fp.loop.steps.optimizer_steps import ComputeLoss, OptimizerSteps, ddp_of
from lightning_fp.stability.keep.batch_ring import MicroBatch, RecordedStep
from lightning_fp.stability.keep.hyperparameters import hyperparameters, set_hyperparameters
from lightning_fp.stability.replay.loop import MadeStep, Train

IN_BLOCKS = "steps are made in blocks (`loop.training_step`), which cannot be run again"
"""Why nothing can be replayed then."""


class StepsAgain:
    """Runs `compute_loss` on copies of recorded batches, from the random state of their time.

    The scheduler does not step, and the guard and the loss scaler keep no record.

    Args:
        precision: the formats and the base.
        steps: makes optimizer steps.
    """

    def __init__(self, precision: LoopPrecision, steps: OptimizerSteps) -> None:
        self.compute_loss: ComputeLoss | None = None
        """Of the step that is about to be made; None where steps are made in blocks."""
        self._precision, self._steps = precision, steps

    def forward_backward(self, micro: MicroBatch, *, backward: bool) -> Tensor:
        """One micro-batch; DDP exchanges nothing, and gradients have no loss scale.

        Args:
            micro: the micro-batch; the random state is the caller's to set.
            backward: whether gradients are wanted.

        Returns:
            The loss: scalar, detached, on its device.
        """
        scaler, precision, steps = self._precision.base.scaler, self._precision, self._steps
        with self._quiet(), self._without_sync():
            with precision.training_forward():
                loss = self._compute(precision.input(_placed(micro)))
            try:
                if backward:
                    with precision.precision_map.attention_context():
                        steps.backward(scaler.scaled(loss))
            finally:
                precision.backward_done()
            if backward and precision.scaler is not None:
                precision.scaler.unscale_all(steps.model.parameters())
        return loss.detach()

    @contextmanager
    def making(self) -> Generator[Train, None, None]:
        """Whole steps are made in the block; learning rates are put back after it."""
        now = hyperparameters(self._steps.optimizer)
        try:
            with self._quiet():
                yield self._make
        finally:
            set_hyperparameters(self._steps.optimizer, now)

    def _make(self, step: RecordedStep) -> MadeStep:
        """All micro-batches of a step, and the optimizer's; its loss as `StepRecord` has it."""
        steps, guard = self._steps, self._steps.guard
        for optimizer, groups in zip(steps.optimizers, step.begun_with, strict=True):
            set_hyperparameters(optimizer, groups)
        guard.replay_skipped, guard.replay_hyperparameters = False, step.hyperparameters[0]
        micro_batches, losses = step.micro_batches, list[Tensor]()
        placed = [_placed(micro) for micro in micro_batches]

        def forward_backward() -> Tensor:
            first = not losses

            def before(index: int) -> None:
                if first:
                    micro_batches[index].rng.restore()

            made = steps.losses(self._compute, placed, before=before)
            losses.extend(made if first else ())
            return torch.stack(made).sum()

        steps.step(forward_backward)
        if guard.replay_skipped:
            return MadeStep(math.nan, False)
        each = torch.stack([loss.float() * len(micro_batches) for loss in losses])
        return MadeStep(float(each.mean()), True)

    def _compute(self, batch: Any) -> Tensor:
        if self.compute_loss is None:
            raise RuntimeError(IN_BLOCKS)
        return self.compute_loss(batch)

    @contextmanager
    def _quiet(self) -> Generator[None, None, None]:
        """Nothing is kept of the steps: not by the guard, the scaler, or who hears backward."""
        steps, guard = self._steps, self._steps.guard
        before = steps.after_backward, steps.left_out
        kept = guard.replaying, guard.replay_skipped, guard.replay_hyperparameters
        guard.replaying, guard.replay_hyperparameters, steps.after_backward = True, None, []
        try:
            with self._precision.base.scaler.untouched():
                yield
        finally:
            steps.after_backward, steps.left_out = before
            guard.replaying, guard.replay_skipped, guard.replay_hyperparameters = kept

    @contextmanager
    def _without_sync(self) -> Generator[None, None, None]:
        """DDP exchanges nothing. FSDP has to: its gradients arrive reduced, in shards."""
        model = ddp_of(self._steps.model)
        if model is None:
            yield
            return
        before, model.require_forward_param_sync = model.require_forward_param_sync, False
        try:
            with model.no_sync():
                yield
        finally:
            model.require_forward_param_sync = before


def _placed(micro: MicroBatch) -> Any:
    """A copy, where the batch was."""
    return copied_to(micro.batch, micro.position.get("device"))
