"""The loss of every step, kept on the device until somebody asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fp.records import LossRow


@dataclass
class _Step:
    """One step under way, or done."""

    step: int
    loss: Tensor
    """float32 scalar: sum over the micro-batches."""
    micro_batches: int = 0
    """Those that had a loss."""
    grad_norm: Tensor | None = None
    seconds: float = 0.0


class StepLosses:
    """Means over the micro-batches of each step; nothing waits for the device but `take`."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._grad_norm: Tensor | None = None
        self._mark = time.perf_counter()

    def note_grad_norm(self, norm: Tensor) -> None:
        """The norm of the gradient of the step under way, from whoever has computed it.

        Args:
            norm: floating-point scalar, on any device.
        """
        self._grad_norm = norm.detach()

    def add(self, step: int, outputs: Any, divided_by: int, device: torch.device) -> None:
        """Take in a micro-batch.

        Args:
            step: the number of optimizer steps there will be when its step is done.
            outputs: what the Trainer hands on of the training step: a loss, a mapping that has
                one, or anything else, which is no loss.
            divided_by: the loss is that of the micro-batch over this number.
            device: where to keep it.
        """
        if not self._steps or self._steps[-1].step != step:
            self._steps.append(_Step(step, torch.zeros((), device=device)))
        current = self._steps[-1]
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            current.loss = current.loss + loss.detach().reshape(()).float() * divided_by
            current.micro_batches += 1
        if self._grad_norm is not None:
            current.grad_norm, self._grad_norm = self._grad_norm, None
        now = time.perf_counter()
        current.seconds += now - self._mark
        self._mark = now

    def take(self, over_ranks: Callable[[Tensor], Tensor]) -> list[LossRow]:
        """All steps since the last time; then start anew.

        Args:
            over_ranks: the mean over ranks; a collective, so call this alike on all.

        Returns:
            One row per step that had a loss.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return []
        sums = torch.stack([step.loss for step in steps])
        counts = torch.tensor([step.micro_batches for step in steps], device=sums.device)
        losses: list[float] = over_ranks(sums / counts).tolist()
        return [
            LossRow(
                step=step.step,
                loss=loss,
                grad_norm=None if step.grad_norm is None else step.grad_norm.item(),
                seconds=round(step.seconds, 6),
            )
            for step, loss in zip(steps, losses, strict=True)
            if step.micro_batches
        ]
