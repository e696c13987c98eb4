"""What a recipe's gates have to go by: measurements of this stage, under the gates' own names.

A gate asks whether this stage is safe, so nothing counts that reaches back into another: a
clamped mass over the last 50 steps says little of formats that are 10 steps old. Evidence is
gathered as it comes and judged between two steps, so a checkpoint at any moment has all of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from lightning_fp.records import read_loss
from lightning_fp.telemetry import LOSS, Board, Follower, RunTelemetry

Points: TypeAlias = "dict[str, list[tuple[int, float]]]"
"""New values by statistic, with the number of optimizer steps done when they were measured."""

LOSS_GAP = "loss_gap"
"""The loss against a recorded run's, which the rollout makes of it."""


class Metrics(Protocol):
    """Puts on the board what nobody of this package measures."""

    validated: bool
    """Whether a validation has ended since the last reading."""

    def publish(self, board: Board, step: int) -> None:
        """Publish what is new."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """See `state_dict`."""
        ...


class GateEvidence:
    """Follows the board for the gates of a recipe, and for stages that end by the loss.

    Args:
        names: by each statistic that is asked for its name on the board.
        baseline: directory of a recorded run, for the gap between the losses; None: there is none.
        metrics: puts on the board what the module logs; None if nobody asks for that.
    """

    def __init__(
        self, names: Mapping[str, str], baseline: str | Path | None, metrics: Metrics | None
    ) -> None:
        self._names = dict(names)
        self._metrics = metrics
        self._recorded: dict[int, float] = {}
        if baseline is not None:
            recorded = read_loss(baseline)
            pairs = zip(recorded.steps.tolist(), recorded.values.tolist(), strict=True)
            self._recorded = dict(pairs)
        self._new: Points = {}
        self._run, self._follower = RunTelemetry(), Follower(())

    def follow(self, run: RunTelemetry) -> None:
        """Hear of what is published from here on; at the start of training."""
        wanted = set(self._names.values())
        if LOSS_GAP in wanted:
            wanted.add(LOSS)
        self._run, self._follower = run, run.board.follow(wanted)

    def gather(self, step: int | None, entered: int) -> None:
        """Take in what is new; nothing is lost if a checkpoint comes before it is asked for.

        Args:
            step: optimizer steps so far; None in the middle of a step, when the module's metrics
                are not read.
            entered: the step at which the stage began: what reaches back further is left out.
        """
        if self._metrics is not None and step is not None:
            self._metrics.publish(self._run.board, step)
        for name, found in self._follower.take().items():
            points = [(m.step, m.value) for m in found if m.since >= entered]
            named = {name: points}
            if name == LOSS:
                named[LOSS_GAP] = [(at, self._gap(at, loss)) for at, loss in points]
            for asked, published in self._names.items():
                self._new.setdefault(asked, []).extend(named.get(published, []))

    def wait(self, step: int | None, entered: int) -> None:
        """`gather`, also of the losses that are still on the device."""
        # They arrive one step late, and a resumed run would miss the one under way.
        self._run.signals.arrive(all=True)
        self.gather(step, entered)

    def take(self) -> Points:
        """What is new since the last time."""
        new, self._new = self._new, {}
        return new

    def _gap(self, step: int, loss: float) -> float:
        """(loss - recorded) / |recorded|; NaN where nothing was recorded."""
        recorded = self._recorded.get(step, math.nan)
        return (loss - recorded) / abs(recorded) if recorded else math.nan

    def validated(self) -> None:
        """A validation has ended: its metrics are new."""
        if self._metrics is not None:
            self._metrics.validated = True

    def state_dict(self) -> dict[str, Any]:
        """What is new, and what the module's metrics were."""
        return {
            "new": {name: [list(point) for point in points] for name, points in self._new.items()},
            "metrics": None if self._metrics is None else self._metrics.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, same_recipe: bool) -> None:
        """See `state_dict`; of another recipe's evidence nothing is kept."""
        if self._metrics is not None and state["metrics"] is not None:
            self._metrics.load_state_dict(state["metrics"])
        if same_recipe:
            new: dict[str, list[list[Any]]] = state["new"]
            self._new = {n: [(at, value) for at, value in points] for n, points in new.items()}
