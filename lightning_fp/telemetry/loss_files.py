"""`loss.csv` of a run: written once, into the directory of each who asks for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch

from lightning_fp.records import LossWriter
from lightning_fp.telemetry.over_ranks import mean
from lightning_fp.telemetry.step_curve import StepCurve
from lightning_fp.telemetry.step_record import StepRecord

log = logging.getLogger(__name__)

INTERVAL = 50
"""Lightning's own default for log intervals, where a loop is told never to log."""


class LossFiles:
    """Appends the steps of each log interval; to be made, and called, alike on all ranks.

    Args:
        directories: where to write; empty on the ranks that do not.
        device: where collectives run.
        interval: length of a log interval in steps; 0 takes `INTERVAL`.
        step: optimizer steps done.
    """

    def __init__(
        self, directories: Iterable[Path], device: torch.device, *, interval: int, step: int
    ) -> None:
        self._curve = StepCurve(device)
        self._writers = [LossWriter(directory) for directory in directories]
        self._interval = interval or INTERVAL
        self._written_at = step

    def add(self, record: StepRecord, step: int) -> None:
        """One more step; at the end of a log interval all are written.

        Args:
            record: of it.
            step: optimizer steps done.
        """
        self._curve.add(record)
        if step // self._interval != self._written_at // self._interval:
            self.write(step)

    def write(self, step: int) -> None:
        """Write what there is; a collective. A failure is said once and does no harm."""
        self._written_at = step
        rows = self._curve.take(mean)
        try:
            for writer in self._writers:
                writer.append(rows)
        except OSError:
            self._writers.clear()
            log.exception("losses cannot be written; training continues without them")
