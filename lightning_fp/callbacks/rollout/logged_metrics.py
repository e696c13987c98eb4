"""What the module itself logs, put on the board for gates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch

from lightning_fp.telemetry import Board


class LoggedMetrics:
    """Reads what the module logs once per log interval and after each validation.

    What is logged in training counts at every reading. Of a validation's metrics, which Lightning
    goes on showing, a value counts when it is another than the one before.

    Args:
        trainer: the Trainer, whose `callback_metrics` are read.
        names: of the metrics.
        interval: steps from one reading to the next.
    """

    def __init__(self, trainer: L.Trainer, names: Sequence[str], interval: int) -> None:
        self._trainer, self._names, self._interval = trainer, names, interval
        self._read_at = 0
        self._seen: dict[str, float] = {}
        self.validated = False
        """Whether a validation has ended since the last reading."""

    def publish(self, board: Board, step: int) -> None:
        """Publish what is new; to be called at every step, on all ranks."""
        due = step // self._interval > self._read_at // self._interval
        if not (due or self.validated):
            return
        began, self._read_at, self.validated = self._read_at, step, False
        # `callback_metrics` keeps what is long past. The training loop's results have only what
        # training logs, by its name; `<name>_step` is one that is logged per step and per epoch.
        results: Any = self._trainer.fit_loop._results
        logged = {metric.meta.name for metric in results.values()}
        for name, value in self._over_ranks().items():
            fresh = name.removesuffix("_step") in logged or value != self._seen.get(name)
            if fresh and not math.isnan(value):
                self._seen[name] = value
                board.publish(name, step, value, since=began)

    def _over_ranks(self) -> dict[str, float]:
        """Means over the ranks that have a value; NaN where none has."""
        metrics: Mapping[str, Any] = self._trainer.callback_metrics
        values = [float(metrics.get(name, math.nan)) for name in self._names]
        if self._trainer.world_size > 1:
            device = self._trainer.strategy.root_device
            here = torch.tensor(values, dtype=torch.float64, device=device)
            known = ~torch.isnan(here)
            sums = torch.stack([torch.where(known, here, 0.0), known.double()])
            total, ranks = self._trainer.strategy.reduce(sums, reduce_op="sum")
            values = (total / ranks).tolist()
        return dict(zip(self._names, values, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """When it read last, and what."""
        return {"read_at": self._read_at, "seen": dict(self._seen), "validated": self.validated}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        self._read_at, self.validated = state["read_at"], state["validated"]
        self._seen = dict(state["seen"])
