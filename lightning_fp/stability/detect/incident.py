"""What points at an anomaly of a run, and the incident once that suffices."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_fp.stability.detect.decision import Cause

VOTES = 5
"""Scores that are asked whether they are outliers; most of them must be."""

WINDOW = 16
"""Scores whose mean says whether an incident is over; its standard error is a quarter of the
noise."""

CUSUM_CLIP = 4.0
"""A score adds at most so much to the sum: a single outlier, of any size, raises no suspicion."""

FARTHEST = 15.0
"""Scores are cut off here, and what is not finite counts as this. One such value alone lifts the
mean of `WINDOW` scores by less than 1 and so makes no divergence (`DivergenceDetector.lasting`)."""

NEAR = 0.25
"""Below this share of the limit of drifts the level is at its floor: there a drift begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnomalyScores:
    """What points at an anomaly so far. Empty to begin with, and after every incident."""

    cusum: float = 0.0
    """Sum of what scores exceed the slack by, never below zero (Page 1954)."""

    climbing: int = 0
    """Steps since that sum was zero."""

    drifting: int = 0
    """Steps since the level was at its floor."""

    scores: tuple[float, ...] = ()
    """Of the last losses in units of their noise, oldest first, at most `VOTES`."""

    grad_scores: tuple[float, ...] = ()
    """The same of the logarithm of the gradient norm."""

    update_scores: tuple[float, ...] = ()
    """The same of the logarithm of the update ratio."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Incident:
    """An anomaly while it lasts."""

    cause: Cause
    """What raised the suspicion."""

    onset: int
    """Steps since it began."""

    age: int = 0
    """Steps since it was noticed."""

    level: float | None
    """What the loss would be without it; None if that was not known."""

    descent: float = 0.0
    """What that falls by at each step, so that a rise on a falling loss does not seem to heal."""

    scores: tuple[float, ...] = ()
    """Of the losses since, against that level, at most `WINDOW`."""

    diverged: bool = False
    """It did not heal in time."""


def with_score(scores: tuple[float, ...], score: float, length: int) -> tuple[float, ...]:
    """The last `length` scores, with one more."""
    return (*scores[1 - length :], min(max(score, -FARTHEST), FARTHEST))


def votes(scores: tuple[float, ...], limit: float) -> int:
    """How many of the scores are above the limit."""
    return len([score for score in scores if score > limit])


def first_vote(scores: tuple[float, ...], limit: float) -> int:
    """Steps ago of the oldest score above the limit."""
    return next(len(scores) - 1 - i for i, score in enumerate(scores) if score > limit)
