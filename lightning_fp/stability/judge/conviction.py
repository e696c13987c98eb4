"""A verdict, from what replays have shown. Pure: what is not known yet is asked for.

From the cheap to the dear: batches on one set of weights, then a trajectory in high precision. The
former are their own control. A trajectory is compared with what was recorded, and would convict
whatever was of one moment: a flipped bit, one bad launch, weights that a user has set. So before it
convicts, the same stretch is asked for in the run's own formats, as it ran. An acquittal needs no
control: where high precision does as badly, nothing is blamed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lightning_fp.stability.judge.by_gap import by_gap
from lightning_fp.stability.judge.by_trajectory import (
    affordable,
    by_control,
    by_trajectory,
    high_stretch,
    proved,
)
from lightning_fp.stability.judge.evidence import SPENT, Case, Evidence
from lightning_fp.stability.questions import (
    Attribute,
    ReplayHigh,
    ReplayStep,
    ReplayStretch,
    Surveyed,
)
from lightning_fp.stability.respond.attribution import STILL, Attribution
from lightning_fp.stability.respond.likely_cause import CauseEvidence, likely_cause
from lightning_fp.stability.respond.verdict import (
    WRONG_BATCHES,
    Finding,
    Judgement,
    OneStep,
    is_calm,
    judge_cure,
    judge_gradients,
    judge_one_step,
    wrong_gradients,
)

SINGLE = 9
"""Replayed steps that the first two questions of a case take: one step, and a gap of 8 batches."""

SHOWN = 0.5
"""Share of the gradients' error on the weights of now, of 1 at most, that those of before have to
show: a fault that has grown since, as gradients that come to be rounded away, had one of five
culprits then, with an error of 0.21 instead of 3.0."""


ELSEWHERE = "the inf or NaN comes from somewhere else"
DOES_NO_HARM = "the error does not harm the loss"


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """What a case has come to."""

    finding: Finding
    one_step: Judgement | None = None
    gap: Judgement | None = None
    """What the last batches say on the weights of now."""

    trajectory: Judgement | None = None
    control: Judgement | None = None
    """What the same trajectory in the run's own formats says about that."""

    attribution: Attribution | None = None
    """Who is to blame, if precision is."""

    likeness: str = ""
    """What it looks like, if precision is not to blame."""

    start: int | None = None
    """Step of the snapshot that the run has to go back to; None: of the weights of now."""

    high: ReplayStretch | None = None
    """The trajectory that can become the run."""

    made: int = 0
    """Steps of it that were not left out."""


def conclude(evidence: Evidence) -> Conclusion:
    """What follows from the evidence.

    It is written as if all answers were there: the first that is missing is the next to ask.

    Raises:
        UnansweredError: with the next question.
    """
    case, survey = evidence.case, evidence.survey
    if not survey.low:
        return Conclusion(finding="not precision")
    if not survey.replayable:
        return Conclusion(finding="unclear")
    if not survey.finite and survey.start is None:
        return _unclear("the weights are not finite, and there is no snapshot to go back to")
    if case.overflow is not None:
        return _overflow(evidence, case.overflow)
    replay_step = ReplayStep(weights=_weights(survey), batch=case.batch)
    if not evidence.affords(replay_step, SINGLE, reserve=0):
        return _unclear(SPENT)
    seen = evidence.answer(replay_step).seen
    one_step = None if seen is None else judge_one_step(seen, case.anomaly)
    if case.left_out:
        return _left_out(evidence, seen, one_step)
    if seen is not None and one_step is not None and one_step.finding == "unclear":
        one_step = _not_cured(case, seen) or _by_gradients(evidence, seen) or one_step
    gap = by_gap(evidence) if survey.finite else None
    high = high_stretch(survey)
    afforded = high is None or affordable(evidence, high)
    stretch = None if high is None or not afforded else evidence.answer(high)
    trajectory = None if stretch is None else by_trajectory(case, survey, stretch)
    if not afforded:
        trajectory = _unclear(f"{SPENT}: no trajectory").one_step
    finding = _together(one_step, trajectory, risen=case.risen)
    at_once = one_step is not None and one_step.finding == finding == "precision"
    if gap is not None and gap.finding == "precision" and not _rises_anyway(case, trajectory):
        # Of a rise the control must show its share: what has damaged weights, as launches gone
        # wrong do, leaves a gap too.
        finding, at_once = "precision", not case.risen
    if not afforded and not at_once:
        finding = "unclear"
    control = None
    if finding == "precision" and stretch is not None and stretch.done:
        control, asked = by_control(evidence, stretch)
        alone = gap is None or gap.finding != "precision"
        if not at_once and alone and control.finding == "precision" and trajectory is not None:
            control = proved(evidence, stretch, trajectory, control, asked)
        finding = finding if at_once else control.finding
    attribution: Attribution | None = None
    likeness = ""
    if finding == "precision":
        attribution = _attribute(evidence, _error(seen))
    elif finding in ("not reproducible", "compiled code") and control is not None:
        likeness = _of_one_moment(finding)
    elif case.risen:
        likeness = likely_cause(_around(evidence, seen))
    else:
        likeness = DOES_NO_HARM
    # Only what the control repeats is the run; else its steps are not made again, but kept.
    repeated = afforded and (control is None or control.finding == "precision")
    taken = high if repeated and stretch is not None and stretch.done else None
    stays = finding == "precision" and survey.finite and not repeated
    return Conclusion(
        finding=finding,
        one_step=one_step,
        gap=gap,
        trajectory=trajectory,
        control=control,
        attribution=attribution,
        likeness=likeness,
        start=None if stays else survey.start,
        high=taken,
        made=0 if stretch is None else stretch.made,
    )


def _left_out(evidence: Evidence, seen: OneStep | None, one_step: Judgement | None) -> Conclusion:
    """A step that was left out because of inf or NaN: its batch says all, and nothing is undone."""
    if seen is None or one_step is None:
        return Conclusion(finding="unclear")
    if one_step.finding == "precision" and not seen.finite:
        attribution = _attribute(evidence, _error(seen))
        return Conclusion(finding="precision", one_step=one_step, attribution=attribution)
    again = _of_one_moment("not reproducible") if seen.finite else ELSEWHERE
    return Conclusion(finding="not precision", one_step=one_step, likeness=again)


def _not_cured(case: Case, seen: OneStep) -> Judgement | None:
    """What was proved once needs no second proof: culprits were left over. None if it is cured."""
    usual = STILL * case.healthy_error
    if not case.on_probation or not is_calm(seen, case.anomaly) or seen.worst_error <= usual:
        return None
    return judge_cure(seen, usual)


def _by_gradients(evidence: Evidence, seen: OneStep) -> Judgement | None:
    """The batches before are asked for as long as gradients are wrong; None if one is not."""
    case, batches = evidence.case, [seen]
    usual = case.anomaly, case.healthy_error, case.healthy_norm
    while wrong_gradients(batches[-1], *usual):
        if len(batches) == WRONG_BATCHES:
            return judge_gradients(batches, case.healthy_error)
        asked = ReplayStep(weights=_weights(evidence.survey), ago=len(batches))
        if not evidence.affords(asked, SINGLE, reserve=0):
            return None
        more = evidence.answer(asked).seen
        if more is None:
            return None
        batches.append(more)
    return None


def _unclear(reason: str) -> Conclusion:
    judgement = Judgement(finding="unclear", reason=reason, numbers={})
    return Conclusion(finding="unclear", one_step=judgement)


def _rises_anyway(case: Case, trajectory: Judgement | None) -> bool:
    """Whether a rise, be it the case's or seen in its trajectory, comes in high precision too."""
    if trajectory is None or trajectory.finding != "not precision":
        return False
    return case.risen or "rise" in trajectory.numbers


def _of_one_moment(finding: Finding) -> str:
    if finding == "compiled code":
        return "it looks like compiled code: without compilation the same batches do not show it"
    return (
        "it cannot be reproduced: a single event, weights that were changed outside of the training"
        " step, or a step that depends on more than its batch and its weights"
    )


def _weights(survey: Surveyed) -> int | None:
    """Nothing can be learned from weights that are not finite."""
    return None if survey.finite else survey.start


def _together(one_step: Judgement | None, trajectory: Judgement | None, *, risen: bool) -> Finding:
    """The trajectory weighs more; one step alone acquits only where there is no trajectory.

    Where no loss has risen, one that does no harm yet does not acquit gradients that are wrong.
    """
    first = "unclear" if one_step is None else one_step.finding
    if trajectory is None or (first == "precision" and not risen):
        return first
    second = trajectory.finding
    if second == "unclear":
        return first if first == "precision" else "unclear"
    return "unclear" if (first, second) == ("precision", "not precision") else second


def _overflow(evidence: Evidence, reason: str) -> Conclusion:
    """Whether the last batch has finite gradients in a format of larger range.

    The overflows themselves are the evidence against FP16, so no trajectory is needed; the steps
    that overflowed were left out, so nothing has to be undone while weights are finite.
    """
    survey = evidence.survey
    high = evidence.answer(ReplayHigh(batch="last", weights=_weights(survey)))
    name = survey.high.name
    finding: Finding = "unclear"
    said = f"{reason}; the batch could not be run in {name}"
    numbers: dict[str, float] = {}
    if high.loss is not None:
        numbers["high_loss"] = high.loss
        finding = "precision" if high.finite else "not precision"
        said = f"{reason}; in {name} they "
        said += "are finite" if high.finite else "are not finite either"
    return Conclusion(
        finding=finding,
        one_step=Judgement(finding=finding, reason=said, numbers=numbers),
        start=None if survey.finite else survey.start,
        likeness="" if finding == "precision" else ELSEWHERE,
    )


def _attribute(evidence: Evidence, error: float) -> Attribution | None:
    """On the weights before the damage; on those of now, if only these show it.

    Args:
        evidence: of a case that convicts.
        error: of the gradients on the weights of now; 0 where nobody knows.
    """
    survey, case = evidence.survey, evidence.case
    if survey.whole:
        return None
    batches = case.unusual if case.batch is None else (case.batch,)
    asked = Attribute(
        healthy=case.healthy_error,
        weights=_weights(survey),
        batches=batches,
        alone=case.batch is not None,
    )
    before: Attribution | None = None
    if case.batch is None and survey.start not in (None, asked.weights):
        before = evidence.answer(replace(asked, weights=survey.start)).found
        shown = max(STILL * case.healthy_error, SHOWN * min(error, 1.0))
        if before is not None and before.culprits and before.error > shown:
            return before
    now = evidence.answer(asked).found
    nobody = now is None or not now.culprits
    faint = before is None or before.error <= STILL * case.healthy_error
    return before if nobody and not faint and before is not None and before.culprits else now


def _error(seen: OneStep | None) -> float:
    """The worst of the gradients; what gives inf or NaN says no more than that they are wrong."""
    if seen is None:
        return 0.0
    return seen.worst_error if math.isfinite(seen.worst_error) else 1.0


def _around(evidence: Evidence, seen: OneStep | None) -> CauseEvidence:
    survey = evidence.survey
    older = evidence.answer(ReplayHigh(batch="first", weights=_weights(survey)))
    return CauseEvidence(
        floor=None if seen is None else seen.floor,
        high_finite=seen is None or seen.high_finite,
        older_finite=older.loss is None or older.finite,
        older_loss=older.loss if older.finite or older.loss is None else math.nan,
        older_loss_then=older.loss_then,
        noise=evidence.case.anomaly.noise,
        rates=survey.rates,
    )
