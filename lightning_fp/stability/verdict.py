"""Verdicts: what replays say about the part that precision had in an anomaly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

Finding = Literal["precision", "not precision", "unclear"]

LEAST_GAIN = 0.01
"""Share of the loss that high precision must gain over a trajectory to be worth a demotion where
the loss itself shows no anomaly. Measured on a tiny GPT over 40 batches: clamped gradients 3.2%,
truncation to one mantissa bit, which a run survives with 0.8%, only 0.5%."""

RECOVERED = 0.35
"""Share of an anomaly that may be left for the loss to count as back at its baseline."""

SAME = 0.35
"""Share of an anomaly that high precision may take away while the two still count as alike."""

LARGE = 4.0
"""A rise of so many times the noise is none of it: two unrelated means of four healthy steps
differ by two thirds of that (`1 - RECOVERED`) once in 10 000 times."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A finding and the numbers it rests on."""

    finding: Finding
    """ "unclear" neither convicts nor acquits."""

    reason: str
    """A sentence."""

    numbers: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Anomaly:
    """What there is to explain."""

    baseline: float | None = None
    """Level of the loss before it began; None if that is not known."""

    noise: float | None = None
    """Standard deviation of a healthy step's loss around that level."""

    @property
    def known(self) -> bool:
        """Whether there is a level to go by."""
        values = (self.baseline, self.noise)
        return all(value is not None and math.isfinite(value) for value in values)


@dataclass(frozen=True, kw_only=True)
class OneStep:
    """The same batch on the same weights, in the current formats and in high precision."""

    loss: float
    """In the current formats, mean over ranks; inf or NaN if it was not finite."""

    high_loss: float
    grad_norm_ratio: float
    """Of the gradients, current formats over high precision; NaN if either is not finite."""

    finite: bool
    """Whether loss and gradients were finite in the current formats."""

    high_finite: bool
    """The same in high precision."""

    grad_error: float
    """Norm of the gradients' difference over the norm in high precision."""

    floor: float
    """`grad_error` of the current formats against themselves: what means nothing."""


def judge_one_step(seen: OneStep, anomaly: Anomaly) -> Verdict:
    """What one batch says. It convicts only where nothing else can be the cause.

    Args:
        seen: the replays.
        anomaly: what there is to explain.
    """
    numbers = {
        "loss": seen.loss,
        "high_loss": seen.high_loss,
        "grad_error": seen.grad_error,
        "grad_norm_ratio": seen.grad_norm_ratio,
        "floor": seen.floor,
    }
    if not seen.finite and seen.high_finite:
        reason = "the batch gives inf or NaN in the current formats and not in high precision"
        return Verdict(finding="precision", reason=reason, numbers=numbers)
    if not seen.finite and not seen.high_finite:
        reason = "the batch gives inf or NaN in high precision too"
        return Verdict(finding="not precision", reason=reason, numbers=numbers)
    gap = seen.loss - seen.high_loss
    if anomaly.known and anomaly.baseline is not None and anomaly.noise is not None:
        height = seen.loss - anomaly.baseline
        if height > LARGE * anomaly.noise and gap > (1 - RECOVERED) * height:
            reason = f"high precision takes {gap / height:.0%} of the loss's rise away at once"
            return Verdict(finding="precision", reason=reason, numbers=numbers)
    reason = "one step in high precision does not tell"
    return Verdict(finding="unclear", reason=reason, numbers=numbers)


def judge_trajectory(
    losses: Sequence[float | None], high_losses: Sequence[float | None], anomaly: Anomaly
) -> Verdict:
    """What the same batches say, trained on from the same snapshot in high precision.

    The two runs are compared step by step, which takes the batches' own differences out; what
    counts is the last quarter, where the runs have had time to part.

    Args:
        losses: of the run, step by step; not finite where a step was skipped or blew up, None
            where the loss is not known, which says nothing.
        high_losses: of the replay in high precision, from the same step on.
        anomaly: what there is to explain; where it is not known, the trajectory's own beginning
            has to serve.

    Returns:
        "unclear" for fewer than 4 steps.
    """
    both = zip(losses, high_losses)  # noqa: B905 - a replay may end early
    pairs = [(a, b) for a, b in both if a is not None and b is not None]
    count, tail = len(pairs), max(4, len(pairs) // 4)
    if count < 4:
        reason = f"a trajectory of {count} steps is too short to tell"
        return Verdict(finding="unclear", reason=reason, numbers={"steps": count})
    if not anomaly.known:
        anomaly = _beginning(pairs)
    live, high = (list(run) for run in zip(*pairs[-tail:], strict=True))
    level = fmean(high)
    numbers = {"steps": count, "loss": fmean(live), "high_loss": level}
    if anomaly.baseline is not None:
        numbers["baseline"] = anomaly.baseline
    bad, high_bad = (sum(not math.isfinite(value) for value in run) for run in (live, high))
    if high_bad:
        alike = 0 < bad <= 2 * high_bad
        reason = f"high precision meets inf or NaN as well, in {high_bad} of {tail} steps"
        return Verdict(
            finding="not precision" if alike else "unclear", reason=reason, numbers=numbers
        )
    if bad:
        reason = f"inf or NaN in {bad} of {tail} steps, none in high precision"
        return _if_recovered(reason, pairs, anomaly, numbers, math.inf)
    gains = [a - b for a, b in zip(live, high, strict=True)]
    gain = fmean(gains)
    error = stdev(gains) / math.sqrt(tail) * (1 + 3 / (tail - 1))
    worth = gain > max(3 * error, LEAST_GAIN * abs(level))
    numbers.update(gain=gain, gain_error=error)
    height = _height(fmean(live), anomaly, tail)
    if height is None:  # no rise to explain: does low precision cost anything worth it?
        if worth:
            reason = f"high precision learns the same batches to a loss {gain:.3g} lower"
            return Verdict(finding="precision", reason=reason, numbers=numbers)
        if gain + 3 * error < LEAST_GAIN * abs(level):
            reason = f"high precision learns the same batches no better (loss lower by {gain:.3g})"
            return Verdict(finding="not precision", reason=reason, numbers=numbers)
        reason = f"high precision lowers the loss by {gain:.3g}, within the noise"
        return Verdict(finding="unclear", reason=reason, numbers=numbers)
    numbers["rise"] = height
    large = height > LARGE * (anomaly.noise or 0.0)
    if gain > (1 - RECOVERED) * height and (large or gain > 3 * error):
        reason = f"the same batches in high precision take {gain / height:.0%} of the rise away"
        return _if_recovered(reason, pairs, anomaly, numbers, height)
    if gain < SAME * height and (large or not worth):
        reason = f"the loss rises in high precision as well ({1 - gain / height:.0%} of the rise)"
        return Verdict(finding="not precision", reason=reason, numbers=numbers)
    reason = f"high precision takes {gain / height:.0%} of the rise away, which does not tell"
    return Verdict(finding="unclear", reason=reason, numbers=numbers)


def _beginning(pairs: Sequence[tuple[float, float]]) -> Anomaly:
    """Level and noise of the first quarter, in the run or, if that blew up at once, the replay."""
    first = max(4, len(pairs) // 4)
    for run in zip(*pairs[:first], strict=True):
        if len(pairs) >= 2 * first and all(map(math.isfinite, run)):
            return Anomaly(baseline=fmean(run), noise=stdev(run))
    return Anomaly()


def _height(level: float, anomaly: Anomaly, count: int) -> float | None:
    """How far the loss has risen; None if that is within the noise of a mean over `count`."""
    if anomaly.baseline is None or anomaly.noise is None:
        return None
    rise = level - anomaly.baseline
    return rise if rise > max(anomaly.noise, 3 * anomaly.noise / math.sqrt(count)) else None


def _if_recovered(
    reason: str,
    pairs: Sequence[tuple[float, float]],
    anomaly: Anomaly,
    numbers: dict[str, float],
    height: float,
) -> Verdict:
    """Convict only if the loss is back at its baseline and was never far from it.

    Two runs gone wild part by chance, and one of them may come by the baseline.
    """
    if anomaly.baseline is None or anomaly.noise is None:
        return Verdict(finding="precision", reason=reason, numbers=numbers)
    left = numbers["high_loss"] - anomaly.baseline
    if left > max(3 * anomaly.noise, RECOVERED * min(height, 10 * anomaly.noise)):
        reason = f"{reason}, but the loss does not come back to its baseline"
        return Verdict(finding="unclear", reason=reason, numbers=numbers)
    peak, high_peak = (_peak(run, anomaly.baseline) for run in _apart_from_bad_batches(pairs))
    if height > LARGE * anomaly.noise and high_peak > min(peak / 2, 10 * anomaly.noise):
        reason = f"{reason}, but there the loss rose as well before it came back"
        return Verdict(finding="unclear", reason=reason, numbers=numbers)
    return Verdict(finding="precision", reason=reason, numbers=numbers)


def _apart_from_bad_batches(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, ...]]:
    """Both runs, without the steps at which neither was finite: those were the data."""
    return list(zip(*(pair for pair in pairs if any(map(math.isfinite, pair))), strict=True))


def _peak(run: Sequence[float], baseline: float) -> float:
    """How far four steps in a row were above the baseline, at worst."""
    above = [value - baseline if math.isfinite(value) else math.inf for value in run]
    return max(fmean(above[i : i + 4]) for i in range(max(1, len(above) - 3)))
