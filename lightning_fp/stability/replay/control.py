"""The control: a stretch of the run again, in its own formats. What it does not repeat is no proof.

A comparison of high precision with what was *recorded* convicts whatever was of one moment: a
launch that went wrong once, a flipped bit, a user's own re-initialisation, faults of compiled code.
So before a conviction the same steps are replayed as they ran. On the CPU, eager, such a replay was
bit-equal over up to 256 steps; elsewhere (accumulation, gradient noise, Inductor, atomics) it
differs a little. Equal bits are not demanded, but the harm: the control must repeat it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

REPEATS = 0.5
"""Share of the harm from which on the control repeats it."""

DOES_NOT = 0.2
"""Share of the harm up to which it does not. A flipped bit and a re-initialisation came to 0.4%."""

EXACT = 1e-6
"""Relative difference of two losses that are the same but for the order of sums: accumulation makes
1e-7."""

TOLERATED = 4e-3
"""The same of steps with noise of their own: Inductor against eager 0.4%, weights projected or
gradients blurred after the step 0.3%."""

JUMP = 10.0
"""Times as far apart as ever before: an event, and no drift."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """What a control says."""

    finding: Literal["repeats", "unclear", "not reproducible"]

    reason: str

    share: float
    """Of the harm, that the control repeats; NaN where there is none."""

    first_difference: int | None = None
    """The first step whose loss is not the recorded one."""

    difference: float = 0.0
    """Relative difference of that loss; inf where only one is finite."""

    @property
    def numbers(self) -> dict[str, float]:
        """For an event."""
        numbers = {"share_repeated": self.share}
        if self.first_difference is not None:
            numbers |= {"first_difference": self.first_difference, "difference": self.difference}
        return numbers


def judge_control(
    record: Sequence[float | None],
    control: Sequence[float | None],
    high: Sequence[float | None],
    *,
    steps: Sequence[int] | None = None,
) -> Control:
    """Whether the control repeats the harm that the record shows.

    Args:
        record: losses of the run; None where one is not known, not finite where a step was left out
            or blew up.
        control: the same steps again in the formats, histories and attributes of their time.
        high: the same steps in high precision.
        steps: their numbers; by default they are counted from 0.
    """
    index = first_difference(record, control)
    step = None if index is None else index if steps is None else steps[index]
    apart = 0.0 if index is None else _apart(record[index], control[index])
    share = _share(record, control, high)
    finding, reason = _weigh(share)
    if finding == "not reproducible" and step is not None:
        reason = (
            f"{reason}; from step {step} on their losses differ from those recorded, by {apart:.1%}"
        )
    return Control(
        finding=finding, reason=reason, share=share, first_difference=step, difference=apart
    )


def first_difference(
    one: Sequence[float | None], other: Sequence[float | None], *, tolerance: float = EXACT
) -> int | None:
    """Where two runs part, and not merely drift apart as sums in another order do.

    Args:
        one: losses, step by step; None where one is not known, which counts as the same.
        other: of the same steps.
        tolerance: relative difference up to which two count as the same.

    Returns:
        Index of the first step that differs ten times as much as any before; else of the first that
        differs; None if there is none.
    """
    apart = [_apart(a, b) for a, b in zip(one, other)]  # noqa: B905 - one may have come further
    most, first = tolerance, None
    for index, difference in enumerate(apart):
        if difference > JUMP * most:
            return index
        if first is None and difference > tolerance:
            first = index
        most = max(most, difference)
    return first


def _apart(a: float | None, b: float | None) -> float:
    if a is None or b is None:
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return 0.0 if math.isfinite(a) == math.isfinite(b) else math.inf
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))


def _share(
    record: Sequence[float | None], control: Sequence[float | None], high: Sequence[float | None]
) -> float:
    """Over the last quarter, where a harm has had time to show; at least the last four steps."""
    known = [
        (a, b, c)
        for a, b, c in zip(record, control, high)  # noqa: B905 - one may have come further
        if a is not None and b is not None and c is not None and math.isfinite(c)
    ]
    tail = known[-max(4, len(known) // 4) :]
    lost = [math.isfinite(b) for a, b, _ in tail if not math.isfinite(a)]
    if lost:
        return sum(not finite for finite in lost) / len(lost)
    if not tail:
        return math.nan
    harm = fmean(a - c for a, _, c in tail)
    if harm <= 0:
        return math.nan
    if not all(math.isfinite(b) for _, b, _ in tail):
        return math.inf
    return fmean(b - c for _, b, c in tail) / harm


def _weigh(share: float) -> tuple[Literal["repeats", "unclear", "not reproducible"], str]:
    if math.isnan(share):
        return "unclear", "there is no harm for a control run to repeat"
    again = "all" if share >= 1 else f"{max(share, 0.0):.0%}"
    said = f"trained again in the run's own formats, the same steps show {again} of the harm"
    if share >= REPEATS:
        return "repeats", said
    return ("not reproducible" if share <= DOES_NOT else "unclear"), said
