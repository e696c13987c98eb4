"""Paired trajectories: the same batches trained on twice, in the run's formats and in high ones.

Step by step the batches' own differences cancel, and a gain of high precision stands out long
before either curve shows it. Measured on Llama-like, ViT, Mixer and BatchNorm nets, over 64 steps:
a healthy mean gain is at most 0.2% of the loss (0.7% at high learning rates), a single step's
standard deviation 0.05% to 0.3%, with little correlation from step to step. The windows below
decided 4 steps after a sharp fault, 50 to 60 after a slow one, and were wrong in 2 of 131 healthy
stretches, both of BatchNorm nets in their first steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, stdev
from typing import Literal

WINDOWS = (4, 8, 16, 32)
"""Steps over which gains are averaged, all of them after each step."""

Z = 4.5
"""Standard errors that a mean must be away from zero."""

LONG = 16
"""Steps of a window from which `Z` is enough. Where a run is chaos the gains have heavy tails, and
a few steps are mostly their outliers: at 100 times the learning rate 4 steps came to 4.55."""

FLOOR = 0.01
"""Share of the loss that a gain must come to. At 0.5% warm restarts would be blamed."""

WHAT_PLACEBO = "a placebo, tiny random changes of the weights"

PLACEBO = 3.0
"""Times the placebo's difference that a gain must come to."""

WITHOUT_PLACEBO = 0.02
"""Share of the loss that a gain must come to where chaos was not measured."""

LEAST_NOISE = 5e-4
"""Standard deviation of one step's gain, at least: the smallest that was seen."""

RISE = 3.0
"""Standard errors of the loss's level, before and now, that make a rise."""

SHARED = 0.35
"""Share of a rise that high precision may take away while it counts as shared."""


@dataclass(frozen=True, kw_only=True)
class Paired:
    """What two trajectories say about each other."""

    finding: Literal["harm", "no harm", "unclear"]
    """ "no harm" only where the loss has risen, and rose in high precision as well. Where it has
    not, what there is not may still come."""

    reason: str

    gain: float
    """Of high precision, as a share of its loss, over the window that shows it best."""

    window: int = 0
    """Steps of that window."""

    score: float = 0.0
    """Standard errors that its mean is away from zero."""

    decided: int | None = None
    """Index of the step with which it was decided."""

    wants_placebo: bool = False
    """Whether a placebo has to be run: the gain is large, and it may be chaos."""

    rise: float | None = None
    """By how much the loss has risen in both, if that is what was found."""

    @property
    def numbers(self) -> dict[str, float]:
        """For an event."""
        numbers = {"gain": self.gain, "window": float(self.window), "score": self.score}
        return numbers if self.rise is None else {**numbers, "rise": self.rise}


def judge_paired(
    control: Sequence[float | None],
    high: Sequence[float | None],
    *,
    placebo: Sequence[float | None] | None = None,
    baseline: float | None = None,
    error: float = 0.0,
    least: float = 0.0,
) -> Paired:
    """Compare two trajectories as far as they have come.

    Args:
        control: losses in the run's formats, replayed; None where one is not known, not finite
            where a step was left out or blew up.
        high: the same steps in high precision.
        placebo: the same steps in the run's formats from weights that `perturb_` has moved.
        baseline: level of the loss before; None if that is not known. What rises from it in both
            is no harm, whatever they part by on the way: at a learning rate that is far too high
            that is 2%.
        error: what `baseline` may be off by.
        least: the loss from which on shares of it tell, see `Anomaly.least`.

    Returns:
        What was found: of harm with the earliest step that decides, where it lasts to the end; of a
        shared rise with the last.
    """
    best = Paired(finding="unclear", reason="too few steps to tell", gain=math.nan)
    pairs = _pairs(control, high)
    shared = None if baseline is None else _shared_rise(pairs, baseline, error)
    if shared is not None:
        return shared
    for count in range(WINDOWS[0], len(pairs) + 1):
        seen = _after(pairs[:count], placebo, least)
        if seen.finding == "harm" and _lasts(pairs[count - seen.window :], seen.window, least):
            return seen
        best = seen if seen.finding == "unclear" else replace(seen, finding="unclear", decided=None)
    return best


def has_shown(control: Sequence[float | None], high: Sequence[float | None]) -> bool:
    """Whether the last step decides that the run's formats do harm, without a placebo."""
    pairs = _pairs(control, high)
    return len(pairs) >= WINDOWS[0] and _after(pairs, None, 0.0).finding == "harm"


def _lasts(pairs: Sequence[_Pair], window: int, least: float) -> bool:
    """Whether a gain is still there, from the window that shows it to the end.

    Where two runs begin to part in chaos the first steps apart are many times what the steps before
    differed by, and later ones go either way.
    """
    gains = [low - top for _, low, top in pairs]
    if len(pairs) == window or not all(map(math.isfinite, gains)):
        return True
    unit = max(abs(fmean(top for _, _, top in pairs)), least) or 1.0
    error = stdev(gains) / math.sqrt(len(gains))
    return fmean(gains) > max(FLOOR * unit, 2 * error)


_Pair = tuple[int, float, float]
"""Index of a step, its loss in the run's formats and in high precision."""


def _pairs(control: Sequence[float | None], high: Sequence[float | None]) -> list[_Pair]:
    """The steps of which both are known, and high precision's is finite."""
    both = enumerate(zip(control, high))  # noqa: B905 - one may have come further
    return [
        (index, low, top)
        for index, (low, top) in both
        if low is not None and top is not None and math.isfinite(top)
    ]


def _after(pairs: Sequence[_Pair], placebo: Sequence[float | None] | None, least: float) -> Paired:
    """The window that shows most, after these steps."""
    last = pairs[-1][0]
    lost = [index for index, low, _ in pairs[-WINDOWS[0] :] if not math.isfinite(low)]
    if len(lost) == WINDOWS[0]:
        reason = f"{len(lost)} steps in a row give inf or NaN, and none in high precision"
        return Paired(finding="harm", reason=reason, gain=math.inf, window=len(lost), decided=last)
    finite = [(index, low, top) for index, low, top in pairs if math.isfinite(low)]
    if len(finite) < WINDOWS[0]:
        return Paired(finding="unclear", reason="too few steps to tell", gain=math.nan)
    gains = [low - top for _, low, top in finite]
    deviation = _deviation(gains)
    found: list[Paired] = []
    for window in (w for w in WINDOWS if w <= len(gains)):
        unit = max(abs(fmean(top for _, _, top in finite[-window:])), least) or 1.0
        gain = fmean(gains[-window:]) / unit
        error = max(deviation / unit, LEAST_NOISE) / math.sqrt(window)
        chaos = _chaos(finite[-window:], placebo, unit)
        found.append(_weigh(gain, gain / error, window, chaos, last))
    order = {"harm": 2, "unclear": 1}
    return max(found, key=lambda each: (order.get(each.finding, 0), each.wants_placebo, each.score))


def _weigh(gain: float, score: float, window: int, chaos: float | None, last: int) -> Paired:
    least = WITHOUT_PLACEBO if chaos is None else max(FLOOR, PLACEBO * chaos)
    shows = score > Z * math.sqrt(max(1.0, LONG / window)) and gain > FLOOR
    side = "lower" if gain >= 0 else "higher"
    lower = f"the loss is {abs(gain):.1%} {side} in high precision over {window} steps"
    if shows and gain > least:
        reason = f"with the same batches {lower}"
        finding, decided = "harm", last
    elif shows and chaos is not None:
        reason = f"{lower}; this may be chance: {WHAT_PLACEBO}, moves it by {chaos:.1%}"
        finding, decided = "unclear", None
    else:
        then = "a control has to confirm" if shows else "is too little to tell from chance"
        reason = f"{lower}, which {then}"
        finding, decided = "unclear", None
    return Paired(
        finding=finding,
        reason=reason,
        gain=gain,
        window=window,
        score=score,
        decided=decided,
        wants_placebo=shows and chaos is None,
    )


def _chaos(
    pairs: Sequence[_Pair], placebo: Sequence[float | None] | None, unit: float
) -> float | None:
    """How far the placebo is from the run's formats in the same steps; inf where it blew up."""
    if placebo is None:
        return None
    there = [(low, placebo[index]) for index, low, _ in pairs if index < len(placebo)]
    known = [low - value for low, value in there if value is not None]
    if len(known) < len(pairs):
        return None
    return abs(fmean(known)) / unit if all(map(math.isfinite, known)) else math.inf


def _deviation(gains: Sequence[float]) -> float:
    """Of one step's gain, from neighbours, where neither a fault nor a trend counts as noise."""
    steps = sorted(abs(b - a) for a, b in pairwise(gains))
    kept = steps[: max(1, int(len(steps) * 0.9))]  # the onset itself is no noise
    return math.sqrt(fmean(step * step for step in kept) / 2)


def _shared_rise(pairs: Sequence[_Pair], baseline: float, error: float) -> Paired | None:
    """Whether what rose in the run's formats rose in high precision as well.

    In the last quarter, where the two have had time to part. A single step's noise is no measure of
    a rise: where the learning rate is too high the steps scatter as far as the level has risen.
    """
    tail = pairs[-max(WINDOWS[0], len(pairs) // 4) :]
    if len(tail) < WINDOWS[0] or not all(math.isfinite(low) for _, low, _ in tail):
        return None
    low, top = fmean(pair[1] for pair in tail), fmean(pair[2] for pair in tail)
    height = low - baseline
    spread = _deviation([pair[1] for pair in tail])
    now = spread / math.sqrt(len(tail)) * (1 + 3 / (len(tail) - 1))  # more for few, as Student's t
    if height <= RISE * math.hypot(error, now) or low - top >= SHARED * height:
        return None
    reason = f"the loss rises in high precision too, {(top - baseline) / height:.0%} as much"
    return Paired(
        finding="no harm",
        reason=reason,
        gain=(low - top) / (abs(top) or 1.0),
        window=len(tail),
        decided=pairs[-1][0],
        rise=height,
    )
