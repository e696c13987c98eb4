"""Where the loss began: what a run has learned is what it has fallen by since."""

from __future__ import annotations

import math
from statistics import median

FIRST = 5
"""Losses that the beginning is taken from. Small regressors have learned most after sixteen."""


def with_loss(first: tuple[float, ...], loss: float | None) -> tuple[float, ...]:
    """The first losses of a run, with one more if it is one of them.

    Args:
        first: those so far.
        loss: of a step; what is not finite, or not known, is none.
    """
    if len(first) == FIRST or loss is None or not math.isfinite(loss):
        return first
    return (*first, loss)


def learned(first: tuple[float, ...], level: float | None) -> float:
    """What the loss has fallen by, at least 0; 0 as long as that is not known.

    Args:
        first: see `with_loss`.
        level: what is usual now.
    """
    if len(first) < FIRST or level is None or not math.isfinite(level):
        return 0.0
    return max(0.0, median(first) - level)
