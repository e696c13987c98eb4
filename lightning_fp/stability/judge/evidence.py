"""A case, and what is known of it so far. Pure: what is not known yet is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from lightning_fp.stability.questions import Answer, Question, Survey, Surveyed
from lightning_fp.stability.replay.budget import RESERVE, most_steps
from lightning_fp.stability.respond.attribution import HEALTHY_ERROR
from lightning_fp.stability.respond.probe import FIRST
from lightning_fp.stability.respond.verdict import Anomaly

A = TypeVar("A", bound=Answer)

SPENT = "the replay budget is spent"

MOST_PROBED = 2 * FIRST
"""Steps that a probe's suspicion may replay: those to the probe before, and as many again. The
oldest snapshots are older, and each suspicion would replay most of a young run."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is to be looked into."""

    step: int
    """Optimizer steps so far."""

    onset: int
    """The first anomalous one."""

    anomaly: Anomaly = field(default_factory=Anomaly)
    healthy_error: float = HEALTHY_ERROR
    """Relative error of the gradients in these formats while the run was healthy."""

    healthy_norm: float | None = None
    """Norm of the gradients in high precision when the run was last healthy, if that is known."""

    risen: bool = True
    """Whether the loss has risen; if not, the question is whether it could be lower."""

    overflow: str | None = None
    """Why FP16's range seems not to suffice, if that is the question."""

    batch: int | None = None
    """The step of the batch that shows it, if one alone does."""

    left_out: bool = False
    """Whether that step was left out because something was inf or NaN."""

    on_probation: bool = False
    """Whether layers have been demoted, and gradients are out of the usual all the same."""

    unusual: tuple[int, ...] = ()
    """Steps of the last batches whose casts were most unusual, worst first."""

    budget: float = math.inf
    """Steps that may be replayed for it."""

    @property
    def survey(self) -> Survey:
        """The first question: what there is to replay."""
        most = int(min(MOST_PROBED, most_steps(self.budget)))
        return Survey(at=self.step, onset=self.onset, risen=self.risen, most=most)


class UnansweredError(Exception):
    """A question has no answer yet."""

    def __init__(self, question: Question[Any]) -> None:
        super().__init__(question)
        self.question = question


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A case, and the questions that were answered."""

    case: Case
    known: Mapping[Question[Any], Answer] = field(default_factory=dict[Question[Any], Answer])

    def answer(self, question: Question[A]) -> A:
        """What it came to.

        Raises:
            UnansweredError: if it was not asked yet.
        """
        if question not in self.known:
            raise UnansweredError(question)
        return cast("A", self.known[question])

    def told(self, question: Question[Any], answer: Answer) -> Evidence:
        """With one more answer."""
        return replace(self, known={**self.known, question: answer})

    @property
    def survey(self) -> Surveyed:
        """What there is to replay."""
        return self.answer(self.case.survey)

    def affords(self, question: Question[Any], cost: float, *, reserve: float = RESERVE) -> bool:
        """Whether something may be asked, or was.

        Args:
            question: what.
            cost: in replayed steps.
            reserve: what must be left for what follows.
        """
        spent = sum(answer.replays for answer in self.known.values())
        return question in self.known or cost + reserve <= self.case.budget - spent
