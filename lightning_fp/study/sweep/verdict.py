"""What a run's losses come to: diverged or not, spikes, where it ended.

The judge is our own detector, its patience shortened where a run is shorter than what it waits for
by default. A run that rises before the detector has learned what is usual can only be told by its
end: it is clearly above its beginning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from lightning_fp.stability.detect.decision import Cause, Decision
from lightning_fp.stability.detect.detector import DivergenceDetector
from lightning_fp.stability.detect.signal_level import START
from lightning_fp.study.spikes import MAD_TO_SIGMA

_PATIENCE = 8
"""Shares of a run: the detector arms, and gives anomalies time to heal, for one in so many."""

_HOPELESS = 10
"""Losses in a row that are not finite after which nobody waits for more."""

_FIRST = 3
"""Losses that are the loss before training."""

_CLEAR = 3.0
"""Standard errors by which the loss at the end is above that at the beginning, to count."""

_POINTS = 50
"""Of the curve that is kept in the table."""

_NOT_SPIKES = (Cause.GRADIENT, Cause.UPDATE)


def detector_for(steps: int) -> DivergenceDetector:
    """The detector with defaults that fit into a run.

    Args:
        steps: of the run.
    """
    default = DivergenceDetector()
    return DivergenceDetector(
        armed=max(START, min(default.armed, steps // _PATIENCE)),
        heals=max(_PATIENCE, min(default.heals, steps // _PATIENCE)),
    )


class LossJudge:
    """Judges a run while it goes on.

    Args:
        steps: that it is to have.
    """

    def __init__(self, steps: int) -> None:
        self.planned = steps
        self.losses: list[float] = []
        self.spikes = 0
        self._detector = detector_for(steps)
        self._state = self._detector.init()
        self._kind = "ok"
        self._cause = ""
        self._since: int | None = None
        self._nonfinite = 0

    def step(self, loss: float, grad_norm: float | None, lr: float | None) -> Decision:
        """One more step.

        Args:
            loss: its loss.
            grad_norm: of its gradients before clipping.
            lr: its learning rate.
        """
        self.losses.append(loss)
        self._state, decision = self._detector.step(
            self._state, loss=loss, grad_norm=grad_norm, lr=lr
        )
        odd = decision.kind in ("suspect", "diverged") and decision.cause not in _NOT_SPIKES
        before = self._kind in ("suspect", "diverged")
        self.spikes += odd and not before
        if decision.kind == "diverged" and self._kind != "diverged":
            self._since, self._cause = (
                len(self.losses) - (decision.onset or 0),
                decision.cause.value,
            )
        self._kind = decision.kind if odd else "ok"
        self._nonfinite = 0 if math.isfinite(loss) else self._nonfinite + 1
        return decision

    @property
    def is_dead(self) -> bool:
        """Whether nothing is to be hoped for, unless somebody steps in."""
        return self._kind == "diverged" or self._nonfinite >= _HOPELESS

    def result(self) -> dict[str, Any]:
        """What the run came to; None for what is not finite, or not known."""
        losses, made = self.losses, len(self.losses)
        last = losses[-closing_steps(self.planned) :]
        first = _mean(losses[:_FIRST])
        final = _mean(last)
        diverged, at, why = False, None, ""
        if self._kind == "diverged":
            diverged, at, why = True, self._since, self._cause.partition(":")[0]
        elif final is None:
            diverged, why = True, "the loss is not finite at the end"
            at = next(i for i, loss in enumerate(losses, 1) if not math.isfinite(loss))
        elif first is not None and final - first > _CLEAR * _error(losses, len(last)):
            diverged, at, why = True, _last_best(losses), "the loss ends higher than it began"
        return {
            "diverged": diverged,
            "diverged_step": at,
            "why": why,
            "first_loss": first,
            "final_loss": final,
            "best_loss": _best(losses, len(last)),
            "spikes": self.spikes,
            "nonfinite_steps": sum(not math.isfinite(loss) for loss in losses),
            "steps": made,
            "curve": _curve(losses, self.planned),
        }


def closing_steps(steps: int) -> int:
    """Steps that a run's final loss is the mean of: its last tenth.

    Args:
        steps: planned of the run.
    """
    return max(1, steps // 10)


def curve_stretch(steps: int) -> int:
    """Steps that a point of the curve in the table stands for.

    Args:
        steps: planned of the run.
    """
    return max(1, steps // _POINTS)


def _mean(losses: Sequence[float]) -> float | None:
    if not losses or not all(map(math.isfinite, losses)):
        return None
    return math.fsum(losses) / len(losses)


def _error(losses: Sequence[float], last: int) -> float:
    """Standard error of the difference of the loss at the end and at the beginning."""
    # Between neighbours, where trends do not count; two of them vary twice as much as one.
    steps = [abs(b - a) for a, b in pairwise(losses) if math.isfinite(b - a)]
    noise = MAD_TO_SIGMA * median(steps) / math.sqrt(2) if steps else 0.0
    return noise * math.sqrt(1 / _FIRST + 1 / last)


def _best(losses: Sequence[float], window: int) -> float | None:
    """The lowest mean over so many steps."""
    means = (_mean(losses[i : i + window]) for i in range(len(losses) - window + 1))
    return min((mean for mean in means if mean is not None), default=None)


def _last_best(losses: Sequence[float]) -> int:
    """The step after the lowest loss."""
    return min(range(len(losses)), key=lambda i: losses[i]) + 1


def _curve(losses: Sequence[float], planned: int) -> list[float | None]:
    """Means over equal stretches of the planned steps; None where there are no finite ones."""
    stretch = curve_stretch(planned)
    means = [_mean(losses[i : i + stretch]) for i in range(0, len(losses), stretch)]
    return [None if mean is None else round(mean, 6) for mean in means]
