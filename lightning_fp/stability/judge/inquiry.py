"""One case while it is being asked: which replay is next, until there is a verdict. Pure.

Replays are dear, so each is run only if what is known by then leaves the question open. How a
verdict follows is written once, in `conviction.conclude`, as if all were known: it runs again with
every answer, and stops at the first that is missing. That is the next question.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_fp.stability.judge.conviction import Conclusion, conclude
from lightning_fp.stability.judge.evidence import Case, Evidence, UnansweredError
from lightning_fp.stability.questions import Answer, Question


@dataclass(frozen=True, kw_only=True)
class Inquiry:
    """A question that waits for its answer, and all answers before."""

    evidence: Evidence
    question: Question[Any]

    @property
    def case(self) -> Case:
        """What it is about."""
        return self.evidence.case


def open_case(case: Case) -> Inquiry:
    """The first question: what there is to replay."""
    return Inquiry(evidence=Evidence(case=case), question=case.survey)


def answered(inquiry: Inquiry, answer: Answer) -> Inquiry | Conclusion:
    """The next question, or what the case has come to."""
    evidence = inquiry.evidence.told(inquiry.question, answer)
    try:
        return conclude(evidence)
    except UnansweredError as missing:
        return Inquiry(evidence=evidence, question=missing.question)
