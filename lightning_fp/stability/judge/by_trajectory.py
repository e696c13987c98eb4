"""What the steps since a snapshot say, trained on again."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from lightning_fp.stability.actions import ReplayStretch, StretchReplayed, Surveyed
from lightning_fp.stability.judge.evidence import Case, Evidence
from lightning_fp.stability.replay.control import TOLERATED, Control, judge_control
from lightning_fp.stability.respond.verdict import Anomaly, Finding, Judgement, judge_trajectory


def by_control(evidence: Evidence, high: StretchReplayed) -> Judgement:
    """The same stretch in the run's own formats: what it does not repeat is no proof."""
    survey = evidence.survey
    own = _stretch(survey, "own")
    seen = _compare(survey, evidence.answer(own), high)
    if seen.finding != "not reproducible" or not survey.compiled:
        return _judged(seen)
    compiled = _compare(survey, evidence.answer(replace(own, compiled=True)), high)
    if compiled.finding != "repeats":
        return _judged(compiled)
    # The fault is there only where code is compiled: is it the format's, or the compiler's?
    again = evidence.answer(replace(own, precision="high", compiled=True))
    blamed = _compare(survey, again, high).finding != "repeats"
    cause = "only the format's compiled kernel shows it" if blamed else "in high precision too"
    return Judgement(
        finding="precision" if blamed else "compiled code",
        reason=f"compiled, {compiled.reason}; eagerly, {seen.reason}; {cause}",
        numbers={"share_compiled": compiled.share, "share_eager": seen.share},
    )


def _compare(survey: Surveyed, own: StretchReplayed, high: StretchReplayed) -> Control:
    return judge_control(survey.losses or (), own.losses, high.losses, steps=survey.steps)


def _judged(control: Control) -> Judgement:
    exact = control.first_difference is None or control.difference <= TOLERATED
    repeats = control.finding == "repeats" or (exact and control.finding == "unclear")
    finding: Finding = "precision" if repeats else "unclear"
    if control.finding == "not reproducible":
        finding = "not reproducible"
    return Judgement(finding=finding, reason=control.reason, numbers=control.numbers)


def high_stretch(survey: Surveyed) -> ReplayStretch | None:
    """The question for it; None where there is nothing to replay."""
    return None if survey.start is None or not survey.losses else _stretch(survey, "high")


def _stretch(survey: Surveyed, precision: Literal["high", "own"]) -> ReplayStretch:
    if survey.start is None:
        raise RuntimeError("a trajectory needs a snapshot to begin at")
    return ReplayStretch(start=survey.start, precision=precision)


def by_trajectory(case: Case, survey: Surveyed, high: StretchReplayed) -> Judgement:
    """The record against the same steps in high precision."""
    if not high.done:
        reason = "memory does not suffice for a replay in high precision"
        return Judgement(finding="unclear", reason=reason, numbers={})
    anomaly = case.anomaly if case.risen else Anomaly()
    return judge_trajectory(survey.losses or (), high.losses, anomaly)
