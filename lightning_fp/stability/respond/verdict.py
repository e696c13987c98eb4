"""Verdicts: what replays say about the part that precision had in an anomaly.

A wrong conviction costs speed and hides the true cause; a wrong acquittal lets the run spoil. So
both need evidence, and without it a verdict is "unclear", which is asked again. One step convicts
only where nothing but the format can be the cause. A trajectory is compared step by step, which
takes the batches' own differences out, and judged where the two have had time to part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, TypeAlias

from lightning_fp.counting import counted

Finding = Literal["precision", "not precision", "unclear", "not reproducible", "compiled code"]
"""The last two: run again, the same batches do not show it; they show it only where compiled."""

_Pairs: TypeAlias = "Sequence[tuple[float, float]]"
"""By step, the loss of the run and that of the replay."""

LEAST_GAIN = 0.02
"""Share of the loss that high precision must gain over a trajectory to be worth a demotion where
the loss itself shows no anomaly. Measured on a tiny GPT over 40 batches: clamped gradients 3.2%,
truncation to one mantissa bit, which a run survives with 0.8%, only 0.5%. Two runs at a learning
rate 30 times too high part by chance, by 1.8% and 2.0% in 2 of 10 seeds."""

RECOVERED = 0.35
"""Share of an anomaly that may be left for the loss to count as back at its baseline."""

SAME = 0.35
"""Share of an anomaly that high precision may take away while the two still count as alike."""

SMALL_LOSS = 5.0
"""Times the noise below which a loss is small. A policy gradient's, or the likelihood of a density,
is around zero or crosses it, and a share of it means nothing: whoever adds a constant to the loss
changes all shares, and neither the noise nor what was learned."""

SHARE_LEARNED = 0.1
"""Share of what the loss has fallen by since the run began, below which it is small. Where a fit
comes to nothing, as a regression's or a small BatchNorm net's, so does its noise, and the roundings
of any format are a large share of what is left."""

LARGE = 4.0
"""A rise of so many times the noise is none of it: two unrelated means of four healthy steps
differ by two thirds of that (`1 - RECOVERED`) once in 10 000 times."""


WRONG = 1.0
"""Error of the gradients that no sound format makes while the loss is where it was: casts to e4m3
and e5m2 make 0.05 to 0.15, 0.79 in warm restarts, 0.65 where one channel hides the others."""

WRONG_IN_A_LAYER = 2.0
"""The same of the worst layer's own; and it must be ten times the usual (`OUT_OF_USUAL`): near a
minimum gradients vanish, and what is left of them is rounding."""

OUT_OF_USUAL = 10.0

WRONG_BATCHES = 3
"""In so many batches gradients have to be wrong. A net can be at an edge for one of them: in a GPT
trained on random tokens, whose residual stream had collapsed, one token of a batch stood where its
attention tips over. Casts made that layer's gradient seven times as large; weights moved by 3% in
high precision, twelve times. So did 2 of 13 batches on the same weights."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
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

    learned: float = 0.0
    """What the loss has fallen by since the run began."""

    @property
    def least(self) -> float:
        """The loss from which on shares of it tell: of a smaller one, shares of this count.

        0 as long as the noise is not known.
        """
        if self.noise is None or not math.isfinite(self.noise):
            return 0.0
        learned = self.learned if math.isfinite(self.learned) else 0.0
        return max(SMALL_LOSS * self.noise, SHARE_LEARNED * learned)

    @property
    def level(self) -> tuple[float, float] | None:
        """Baseline and noise, if there are both."""
        if self.baseline is None or self.noise is None:
            return None
        return (self.baseline, self.noise) if math.isfinite(self.baseline + self.noise) else None


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

    worst_error: float
    """The largest `grad_error` of all gradients together, or of one layer's own."""

    floor: float
    """`grad_error` of the current formats against themselves: what means nothing."""

    high_norm: float = math.nan
    """Norm of the gradients in high precision; NaN where nobody has asked."""


def judge_one_step(seen: OneStep, anomaly: Anomaly) -> Judgement:
    """What one batch says. It convicts only where nothing else can be the cause.

    Args:
        seen: the replays.
        anomaly: what there is to explain.
    """
    numbers = _numbers(seen)
    if not seen.finite and seen.high_finite:
        reason = "the batch gives inf or NaN in the current formats but not in high precision"
        return Judgement(finding="precision", reason=reason, numbers=numbers)
    if not seen.finite and not seen.high_finite:
        reason = "the batch gives inf or NaN in high precision too"
        return Judgement(finding="not precision", reason=reason, numbers=numbers)
    if anomaly.level is not None:
        baseline, noise = anomaly.level
        height, gap = seen.loss - baseline, seen.loss - seen.high_loss
        if height > LARGE * noise and gap > (1 - RECOVERED) * height:
            reason = f"in high precision {gap / height:.0%} of the loss's rise is gone at once"
            return Judgement(finding="precision", reason=reason, numbers=numbers)
    reason = "one step in high precision is not enough to decide"
    return Judgement(finding="unclear", reason=reason, numbers=numbers)


def wrong_gradients(
    seen: OneStep, anomaly: Anomaly, usual: float = 0.15, usual_norm: float | None = None
) -> bool:
    """Whether a batch's gradients are such as no sound format makes.

    Adam and its like scale every step by the gradients themselves, so that wrong ones harm the loss
    late and by little at a time: a gradient that grew by 3% a step cost 5% of a loss in 120 steps
    while no window of the loss told. While the loss is where it was, so are the weights, and the
    gradients of a few batches on them are wrong for no other reason than the format.

    Args:
        seen: the replays.
        anomaly: what there is to explain.
        usual: `worst_error` while the run was healthy.
        usual_norm: `high_norm` when it last was, if that is known.
    """
    if anomaly.level is None or not (seen.finite and seen.high_finite):
        return False
    # Gradients that vanish, as where there is nothing left to learn, leave roundings larger than
    # themselves: so beside what they were as well.
    vanished = usual_norm is not None and seen.grad_error * seen.high_norm <= WRONG * usual_norm
    least = max(WRONG, OUT_OF_USUAL * seen.floor)
    in_a_layer = max(WRONG_IN_A_LAYER, OUT_OF_USUAL * usual)
    wrong = seen.grad_error > least and seen.worst_error > in_a_layer
    return is_calm(seen, anomaly) and not vanished and wrong


def is_calm(seen: OneStep, anomaly: Anomaly) -> bool:
    """Whether a batch's loss is where it was, so that its weights are sound."""
    if not seen.finite:
        return False
    return anomaly.level is None or seen.loss - anomaly.level[0] <= LARGE * anomaly.level[1]


def judge_cure(seen: OneStep, usual: float) -> Judgement:
    """The conviction of what a demotion has left over.

    Args:
        seen: the replays; the loss is where it was.
        usual: the most that `worst_error` may be after a cure.
    """
    reason = (
        f"not cured: after the demotion the gradients' error is {seen.worst_error:.0%} (usually at"
        f" most {usual:.0%})"
    )
    return Judgement(finding="precision", reason=reason, numbers=_numbers(seen))


def judge_gradients(batches: Sequence[OneStep], usual: float) -> Judgement:
    """The conviction by gradients that are wrong in several batches.

    Args:
        batches: the replays, the last batch's first; `wrong_gradients` holds for each.
        usual: see there.
    """
    of_all = min(seen.grad_error for seen in batches)
    in_a_layer = min(seen.worst_error for seen in batches)
    reason = (
        f"the gradients are wrong: in each of {len(batches)} batches their error against high"
        f" precision is at least {of_all:.0%}, and {in_a_layer:.0%} in the worst layer (usually"
        f" {usual:.0%})"
    )
    return Judgement(finding="precision", reason=reason, numbers=_numbers(batches[0]))


def _numbers(seen: OneStep) -> dict[str, float]:
    return {
        "loss": seen.loss,
        "high_loss": seen.high_loss,
        "grad_error": seen.grad_error,
        "worst_error": seen.worst_error,
        "grad_norm_ratio": seen.grad_norm_ratio,
        "floor": seen.floor,
        "high_norm": seen.high_norm,
    }


def judge_trajectory(
    losses: Sequence[float | None], high_losses: Sequence[float | None], anomaly: Anomaly
) -> Judgement:
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
    if len(pairs) < 4:
        reason = f"{counted(len(pairs), 'step')} replayed: too few to decide"
        return Judgement(finding="unclear", reason=reason, numbers={"steps": len(pairs)})
    tail = pairs[-_tail(len(pairs)) :]
    bad, high_bad = (sum(not math.isfinite(value) for value in run) for run in _runs(tail))
    if high_bad:
        alike = 0 < bad <= 2 * high_bad
        reason = f"high precision gives inf or NaN as well, in {high_bad} of {len(tail)} steps"
        numbers: dict[str, float] = {"steps": len(pairs), "bad": bad, "high_bad": high_bad}
        return Judgement(
            finding="not precision" if alike else "unclear", reason=reason, numbers=numbers
        )
    if anomaly.level is None:
        return _judge_by_beginning(pairs, anomaly.least)
    baseline, noise = anomaly.level
    least_rise = max(noise, 3 * noise / math.sqrt(len(tail)))
    return _judge_by_level(pairs, baseline, noise, least_rise=least_rise, least=anomaly.least)


def level_at_first(
    losses: Sequence[float | None], high_losses: Sequence[float | None]
) -> tuple[float, float] | None:
    """Level and noise of a stretch's first four steps: of the run, or the replay if that blew up.

    Args:
        losses: see `judge_trajectory`.
        high_losses: see there.

    Returns:
        None where neither is finite, or there are fewer than 8 steps to be judged by them.
    """
    both = zip(losses, high_losses)  # noqa: B905 - a replay may end early
    pairs = [(a, b) for a, b in both if a is not None and b is not None]
    begun = [run for run in _runs(pairs[:4]) if all(map(math.isfinite, run))]
    return None if len(pairs) < 8 or not begun else (fmean(begun[0]), max(map(stdev, begun)))


def _judge_by_beginning(pairs: _Pairs, least: float) -> Judgement:
    """By its first steps: little to go by, so the replay must not rise by half of what it gains."""
    begun = level_at_first(*_runs(pairs))
    if begun is None:
        reason = "the loss before is not known, and too few steps were replayed to decide"
        return Judgement(finding="unclear", reason=reason, numbers={"steps": len(pairs)})
    baseline, noise = begun
    verdict = _judge_by_level(pairs, baseline, noise, least_rise=LARGE * noise, least=least)
    risen = verdict.numbers["high_loss"] - baseline
    if verdict.finding != "precision" or risen <= verdict.numbers["gain"] / 2:
        return verdict
    reason = f"{verdict.reason}, but the loss rises there too"
    return Judgement(finding="unclear", reason=reason, numbers=verdict.numbers)


def _judge_by_level(
    pairs: _Pairs, baseline: float, noise: float, *, least_rise: float, least: float
) -> Judgement:
    """The replay is finite in the last quarter, and the level before is known.

    A rise of up to `least_rise` is none: not more than the mean of a few steps may be off. A gain
    is a share of the loss, or of `least` if that is more.
    """
    tail = _tail(len(pairs))
    live, high = _runs(pairs[-tail:])
    level = fmean(high)
    numbers = {"steps": len(pairs), "loss": fmean(live), "high_loss": level, "baseline": baseline}
    bad = sum(not math.isfinite(value) for value in live)
    if bad:
        numbers["gain"] = math.inf
        reason = f"{bad} of {tail} steps give inf or NaN, and none in high precision"
        return _if_recovered(reason, pairs, baseline, noise, numbers, math.inf)
    gains = [a - b for a, b in zip(live, high, strict=True)]
    gain = fmean(gains)
    error = stdev(gains) / math.sqrt(tail) * (1 + 3 / (tail - 1))  # more for few, as Student's t
    least_gain = LEAST_GAIN * max(abs(level), least)
    worth = gain > max(3 * error, least_gain + 2 * error)
    numbers.update(gain=gain, gain_error=error)
    height = numbers["loss"] - baseline
    if height <= least_rise:  # nothing to explain: does low precision cost anything worth it?
        if worth:
            reason = f"with the same batches the loss is {gain:.3g} lower in high precision"
            return Judgement(finding="precision", reason=reason, numbers=numbers)
        if gain + 3 * error < least_gain:
            reason = f"with the same batches high precision does no better ({_lower(gain)})"
            return Judgement(finding="not precision", reason=reason, numbers=numbers)
        reason = f"high precision changes little beyond the noise ({_lower(gain)})"
        return Judgement(finding="unclear", reason=reason, numbers=numbers)
    numbers["rise"] = height
    large, calm = height > LARGE * noise, level - baseline <= least_rise
    most = gain > (0.5 if calm else 1 - RECOVERED) * height
    if most and (large or worth):
        reason = f"with the same batches in high precision {gain / height:.0%} of the rise is gone"
        return _if_recovered(reason, pairs, baseline, noise, numbers, height)
    if gain < SAME * height and (large or not worth):
        reason = f"the loss rises in high precision too, {1 - gain / height:.0%} as much"
        return Judgement(finding="not precision", reason=reason, numbers=numbers)
    reason = f"in high precision {gain / height:.0%} of the rise is gone: not enough to decide"
    return Judgement(finding="unclear", reason=reason, numbers=numbers)


def _lower(gain: float) -> str:
    return f"its loss is {abs(gain):.3g} {'lower' if gain >= 0 else 'higher'}"


def _if_recovered(
    reason: str,
    pairs: _Pairs,
    baseline: float,
    noise: float,
    numbers: dict[str, float],
    height: float,
) -> Judgement:
    """Convict only if the loss is back at its baseline and was never far from it.

    Two runs gone wild part by chance, and one of them may come by the baseline.
    """
    left = numbers["high_loss"] - baseline
    if left > max(3 * noise, RECOVERED * min(height, 10 * noise)):
        reason = f"{reason}, but the loss does not return to where it was"
        return Judgement(finding="unclear", reason=reason, numbers=numbers)
    # Where neither was finite, it was the data.
    apart = [pair for pair in pairs if any(map(math.isfinite, pair))]
    peak, high_peak = (_peak(run, baseline) for run in _runs(apart))
    large = LARGE * noise
    if height > large and high_peak > max(large, min(peak / 4, 10 * noise)):
        reason = f"{reason}, but the loss rose there too before it came back"
        return Judgement(finding="unclear", reason=reason, numbers=numbers)
    return Judgement(finding="precision", reason=reason, numbers=numbers)


def _tail(count: int) -> int:
    return max(4, count // 4)


def _runs(pairs: _Pairs) -> tuple[list[float], list[float]]:
    """The run and the replay."""
    return [a for a, _ in pairs], [b for _, b in pairs]


def _peak(run: Sequence[float], baseline: float) -> float:
    """How far the loss was above the baseline, at worst."""
    return max(value - baseline if math.isfinite(value) else math.inf for value in run)
