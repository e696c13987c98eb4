"""One batch whose gradients are wrong is no evidence: others have to show it too."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_fp.events import Demotion, Suspicion, Verdict
from lightning_fp.stability.happenings import Asked
from lightning_fp.stability.questions import (
    Answer,
    Probed,
    ProbeStep,
    Question,
    ReplayStep,
    StepReplayed,
)
from tests.stability.test_watch import Loop, kinds, machine, run, tell

WRONG, USUAL = 6.4, 0.1


class Edge(Loop):
    """Of the batches before the last, the first `others` have wrong gradients as it has.

    Args:
        others: how many.
        probes: by step, whether the probe finds the last batch wrong.
    """

    def __init__(self, others: int = 0, probes: range = range(100, 1000)) -> None:
        super().__init__(error=WRONG)
        self.others, self.probes = others, probes

    def answer(self, question: Question[object]) -> Answer:
        answer = super().answer(question)
        match question, answer:
            case ProbeStep(ago=ago, at=at), Probed():
                wrong = ago <= self.others and (at in self.probes)
                return answer if wrong else replace(answer, error=USUAL)
            case ReplayStep(ago=ago), StepReplayed(seen=seen) if seen and ago > self.others:
                return replace(answer, seen=replace(seen, grad_error=USUAL, worst_error=USUAL))
            case _:
                return answer


def test_a_batch_that_alone_is_out_of_the_usual_opens_no_case() -> None:
    loop = Edge(probes=range(100, 150))  # one probe
    state, events = run(machine(), loop, lambda _: 3.0, 300)
    assert not kinds(events, Suspicion)
    assert [q.ago for q in loop.asked if isinstance(q, ProbeStep)] == [0, 0, 1, 0, 0]
    assert state.probed.alone == 0


def test_two_probes_in_a_row_are_no_chance() -> None:
    loop = Edge(probes=range(100, 1000))
    _, events = run(machine(), loop, lambda _: 3.0, 250)
    (suspicion,) = kinds(events, Suspicion)
    assert suspicion.step == 192
    assert suspicion.numbers["grad_error"] == WRONG


def test_what_the_batch_before_shows_as_well_is_looked_into_at_once() -> None:
    _, events = run(machine(), Edge(others=1), lambda _: 3.0, 150)
    assert [event.step for event in kinds(events, Suspicion)] == [128]


@pytest.mark.parametrize(("others", "convicted"), [(0, False), (1, False), (2, True)])
def test_gradients_convict_only_where_three_batches_are_wrong(others: int, convicted: bool) -> None:
    loop = Edge(others)
    state, _ = run(machine(probe=None), loop, lambda _: 3.0, 150)
    _, events = tell(machine(), state, Asked(at=150, onset=150, risen=False), loop)
    assert bool(kinds(events, Demotion)) is convicted
    asked = [q.ago for q in loop.asked if isinstance(q, ReplayStep)]
    assert asked == list(range(min(others + 2, 3)))
    assert ("in each of 3 batches" in kinds(events, Verdict)[0].reason) is convicted
