"""`loss.csv` of a run: written once, into the directory of each callback that asks for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import lightning as L

from lightning_fp.records import LossWriter
from lightning_fp.telemetry import StepCurve, StepRecord

log = logging.getLogger(__name__)

_INTERVAL = 50
"""Lightning's own default for log intervals, where the Trainer is told never to log."""


class LossFiles:
    """Appends the steps of each log interval; to be made, and called, alike on all ranks.

    Args:
        trainer: the Trainer, at the start of training.
        directories: where to write; empty on the ranks that do not.
    """

    def __init__(self, trainer: L.Trainer, directories: Iterable[Path]) -> None:
        self._trainer = trainer
        self._curve = StepCurve(trainer.strategy.root_device)
        self._writers = [LossWriter(directory) for directory in directories]
        self._written_at = trainer.global_step

    def add(self, record: StepRecord) -> None:
        """One more step; at the end of a log interval all are written."""
        self._curve.add(record)
        interval: int = self._trainer.log_every_n_steps or _INTERVAL  # pyright: ignore[reportAttributeAccessIssue]
        if self._trainer.global_step // interval != self._written_at // interval:
            self.write()

    def write(self) -> None:
        """Write what there is; a collective. A failure is said once and does no harm."""
        self._written_at = self._trainer.global_step
        rows = self._curve.take(lambda x: self._trainer.strategy.reduce(x, reduce_op="mean"))
        try:
            for writer in self._writers:
                writer.append(rows)
        except OSError:
            self._writers.clear()
            log.exception("losses cannot be written; the training goes on without them")
