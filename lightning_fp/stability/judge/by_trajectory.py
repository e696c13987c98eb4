"""What the steps since a snapshot say, trained on again.

High precision is run first, and seen against the record: that acquits, and costs no more. What it
seems to convict of is then proved. The control, the same steps in the run's own formats, must show
the harm too; and from weights that are moved by a placebo the run must not part as far, or it was
chaos.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from lightning_fp.stability.judge.evidence import SPENT, Case, Evidence
from lightning_fp.stability.questions import ReplayStretch, StretchReplayed, Surveyed
from lightning_fp.stability.replay.control import TOLERATED, Control, judge_control
from lightning_fp.stability.replay.paired import (
    FLOOR,
    PLACEBO,
    WHAT_PLACEBO,
    WITHOUT_PLACEBO,
    Paired,
    judge_paired,
)
from lightning_fp.stability.respond.verdict import (
    Finding,
    Judgement,
    judge_trajectory,
    level_at_first,
)


def high_stretch(survey: Surveyed) -> ReplayStretch | None:
    """The question for the trajectory in high precision; None where there is nothing to replay."""
    if survey.start is None or not survey.losses:
        return None
    return ReplayStretch(start=survey.start, precision="high")


def affordable(evidence: Evidence, stretch: ReplayStretch) -> bool:
    """Whether the replay budget suffices for it."""
    return evidence.affords(stretch, len(evidence.survey.losses or ()))


def by_trajectory(case: Case, survey: Surveyed, high: StretchReplayed) -> Judgement:
    """The record against high precision; "precision" is a candidate that `proved` has to prove.

    A rise is explained where high precision takes it away. Where there is none, what counts is
    whether the same batches are learned better, as long as they have been trained on.
    """
    record = survey.losses or ()
    if not high.done:
        reason = "there is not enough memory for a replay in high precision"
        return Judgement(finding="unclear", reason=reason, numbers={})
    least = case.anomaly.least
    if case.risen:
        level = judge_trajectory(record, high.losses, case.anomaly)
        if level.finding == "precision" or "rise" in level.numbers:
            return level
        pair = judge_paired(record, high.losses, least=least)
        return _candidate(pair) if _shows(pair) else level
    # Where nothing has risen the detector may have learned a level that is too high already.
    # The error of the mean of four steps is half their deviation; twice that, as they are few.
    baseline, error = level_at_first(record, high.losses) or (None, 0.0)
    pair = judge_paired(record, high.losses, baseline=baseline, error=error, least=least)
    if _shows(pair):
        return _candidate(pair)
    # Nothing so far: a slow fault may come later, and is asked for again.
    harmless = pair.finding == "no harm" or pair.gain <= FLOOR
    finding: Finding = "not precision" if harmless else "unclear"
    return Judgement(finding=finding, reason=pair.reason, numbers=pair.numbers)


def _shows(pair: Paired) -> bool:
    return pair.finding == "harm" or pair.wants_placebo


def _candidate(pair: Paired) -> Judgement:
    return Judgement(finding="precision", reason=pair.reason, numbers=pair.numbers)


def by_control(evidence: Evidence, high: StretchReplayed) -> tuple[Judgement, ReplayStretch]:
    """The same stretch in the run's own formats: what it does not repeat is no proof.

    Returns:
        What that says, and the control that it was said of. "unclear" if there is none, since the
        budget does not suffice.
    """
    survey, case = evidence.survey, evidence.case
    question = high_stretch(survey)
    if question is None:
        raise RuntimeError("a control needs a trajectory")
    # A probe has no rise to explain, and a slow fault may show in the last steps only.
    own = replace(question, precision="own", until=question if case.risen else None)
    if not affordable(evidence, own):
        return Judgement(finding="unclear", reason=f"{SPENT} before a control run", numbers={}), own
    seen = _compare(survey, evidence.answer(own), high)
    if seen.finding != "not reproducible" or not survey.compiled:
        return _judged(seen), own
    compiled_own = replace(own, compiled=True)
    if not affordable(evidence, compiled_own):
        return _judged(seen), own
    compiled = _compare(survey, evidence.answer(compiled_own), high)
    if compiled.finding != "repeats":
        return _judged(compiled), compiled_own
    # The fault is there only where code is compiled: is it the format's, or the compiler's?
    again = evidence.answer(replace(question, compiled=True))
    blamed = _compare(survey, again, high).finding != "repeats"
    cause = "only in low precision" if blamed else "in high precision too"
    said = Judgement(
        finding="precision" if blamed else "compiled code",
        reason=f"compiled: {compiled.reason}, {cause}; not compiled: {seen.reason}",
        numbers={"share_compiled": compiled.share, "share_eager": seen.share},
    )
    return said, compiled_own


def _compare(survey: Surveyed, own: StretchReplayed, high: StretchReplayed) -> Control:
    return judge_control(survey.losses or (), own.losses, high.losses, steps=survey.steps)


def _judged(control: Control) -> Judgement:
    exact = control.first_difference is None or control.difference <= TOLERATED
    repeats = control.finding == "repeats" or (exact and control.finding == "unclear")
    finding: Finding = "precision" if repeats else "unclear"
    if control.finding == "not reproducible":
        finding = "not reproducible"
    return Judgement(finding=finding, reason=control.reason, numbers=control.numbers)


def proved(
    evidence: Evidence,
    high: StretchReplayed,
    candidate: Judgement,
    control: Judgement,
    asked: ReplayStretch,
) -> Judgement:
    """Whether the harm that the control repeats is more than chaos.

    Args:
        evidence: the case.
        high: the trajectory in high precision.
        candidate: what it says against the record.
        control: what the control says.
        asked: the question that the control answered.

    Returns:
        The control's judgement, and "unclear" where a placebo does as much.
    """
    own, least = evidence.answer(asked).losses, evidence.case.anomaly.least
    again = replace(asked, precision="placebo", until=None, steps=len(own))
    placebo = evidence.answer(again).losses if affordable(evidence, again) else None
    if "rise" in candidate.numbers or math.isinf(candidate.numbers.get("gain", 0.0)):
        gain, moved = _tail(own, high.losses, placebo, least)
        proof, numbers = gain > PLACEBO * moved, {"placebo": moved}
        reason = f"{WHAT_PLACEBO}, makes a difference of {moved:.3g}"
    else:
        pair = judge_paired(own, high.losses, placebo=placebo, least=least)
        proof, reason, numbers = pair.finding == "harm", pair.reason, pair.numbers
    return Judgement(
        finding=control.finding if proof else "unclear",
        reason=f"{control.reason}; {reason}" + ("" if proof else ": this may be chance"),
        numbers={**control.numbers, **numbers},
    )


def _tail(
    own: Sequence[float], high: Sequence[float], placebo: Sequence[float] | None, least: float
) -> tuple[float, float]:
    """What high precision gains in the last steps, and how far the placebo is from the control.

    In losses; where some are not finite in the run's formats, in shares of such steps. Without a
    placebo it counts as so far that 2% of the loss, or of `least`, have to be gained.
    """
    if placebo is None:
        finite = [loss for loss in high if math.isfinite(loss)]
        unit = max(abs(fmean(finite[-4:])), least) if finite else math.inf
        return _tail(own, high, own, least)[0], WITHOUT_PLACEBO * unit / PLACEBO
    count = min(len(own), len(high), len(placebo))
    rows = list(zip(own[:count], high[:count], placebo[:count], strict=True))
    last = [row for row in rows[-max(4, count // 4) :] if math.isfinite(row[1])]
    if not last:
        return 0.0, 0.0
    if not all(math.isfinite(low) for low, _, _ in last):
        lost, moved = (fmean(not math.isfinite(row[i]) for row in last) for i in (0, 2))
        return lost, abs(lost - moved)
    gain = fmean(low - top for low, top, _ in last)
    moved = [low - other for low, _, other in last]
    return gain, abs(fmean(moved)) if all(map(math.isfinite, moved)) else math.inf
