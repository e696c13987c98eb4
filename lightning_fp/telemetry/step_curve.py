"""The records of a log interval on their way from the device to rows of `loss.csv`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_fp.telemetry.step_record import StepRecord

if TYPE_CHECKING:
    from lightning_fp.records.loss import LossRow


class StepCurve:
    """Keeps records on the device until somebody asks; only `take` waits for it.

    Args:
        device: where collectives run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps: list[StepRecord] = []

    def add(self, record: StepRecord) -> None:
        """Keep one more."""
        self._steps.append(record)

    def take(self, over_ranks: Callable[[Tensor], Tensor]) -> list[LossRow]:
        """All steps since the last time.

        Args:
            over_ranks: the mean over ranks; a collective, so call this alike on all.

        Returns:
            One row per step that had a loss.
        """
        from lightning_fp.records.loss import LossRow  # late, for what reads no files

        steps, self._steps = self._steps, []
        if not steps:
            return []
        none = torch.full((), torch.nan, device=self._device)
        losses = [none if s.loss is None else s.loss.to(self._device) for s in steps]
        values: list[float] = over_ranks(torch.stack(losses)).tolist()
        return [
            LossRow(
                step=record.step + 1,
                loss=loss,
                grad_norm=None if record.grad_norm is None else record.grad_norm.item(),
                seconds=round(record.seconds, 6),
            )
            for record, loss in zip(steps, values, strict=True)
            if record.loss is not None
        ]
