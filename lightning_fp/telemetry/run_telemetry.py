"""What is measured in one run: its steps, the signals of each, and the board."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from lightning_fp.layers import PrecisionMap
from lightning_fp.stability.detect.signals import StepSignals
from lightning_fp.telemetry.board import Board
from lightning_fp.telemetry.signal_feed import SignalFeed
from lightning_fp.telemetry.step_record import OptimizerStep, StepRecord, StepRecorder

LOSS = "loss"
"""What the run itself publishes, if somebody follows it: each step's loss over all ranks."""

Logger = Callable[[dict[str, float], int], object]
"""Takes numbers by name, and the step."""


class RunTelemetry:
    """What belongs to a run and not to one who measures in it; in any loop."""

    def __init__(self) -> None:
        self.board = Board()
        """All that is measured in this run."""
        self.step = 0
        """Optimizer steps done."""
        self.last: StepRecord | None = None
        """The step that ended last."""
        self.recorder = StepRecorder()
        """Makes the record of the step under way."""
        self.signals = SignalFeed(self._arrived)
        """The steps' records over all ranks, for who reads every one of them."""
        self.loggers: list[Logger] = []
        """Who is shown numbers; nobody on other ranks."""

    def end_step(
        self,
        step: int,
        optimizers: Sequence[OptimizerStep],
        *,
        table: PrecisionMap | None,
        device: torch.device,
    ) -> StepRecord | None:
        """At the end of a micro-batch: the step's record, on its way to those who read, if it ends.

        Args:
            step: optimizer steps done.
            optimizers: what was seen of those that stepped.
            table: the formats, where there is a table.
            device: where collectives run.
        """
        for each in optimizers:
            self.recorder.stepped(each)
        self.step = step
        record = self.recorder.end(step)
        if record is None:
            return None
        self.last = record
        # Where nobody reads them, steps need no collective.
        if self.signals.wanted or LOSS in self.board.followed:
            headroom = None if table is None else table.scale_history.headroom
            self.signals.put(record, headroom, device)
        return record

    def _arrived(self, seen: StepSignals) -> None:
        if seen.loss is not None:
            self.board.publish(LOSS, seen.step + 1, seen.loss)

    def show(self, values: Mapping[str, float], step: int, *, since: int | None = None) -> None:
        """Put measurements on the board, and show them to the loggers.

        Args:
            values: by name; over all ranks, and given alike on all of them.
            step: optimizer steps done.
            since: see `Board.publish`.
        """
        for name, value in values.items():
            self.board.publish(name, step, value, since=since)
        self.log_metrics(values, step)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers to the loggers alone."""
        for log in self.loggers:
            log(dict(values), step)
