"""A single step left out: asked about at once, without a trajectory, and ever more rarely."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lightning_fp.events import Demotion, Event, Note, Rollback, Suspicion
from lightning_fp.stability.happenings import Attempted, Boundary, StepSeen
from lightning_fp.stability.questions import (
    Answer,
    Attribute,
    Question,
    ReplayStep,
    ReplayStretch,
    StepReplayed,
)
from lightning_fp.stability.respond.verdict import OneStep
from tests.stability.test_watch import Loop, kinds, machine, run, signals, tell


class Overflows(Loop):
    """Batches of `at` give inf or NaN: in the run's formats, in high precision too, or never again.

    Args:
        low: whether run again they do in the run's formats.
        high: whether they do in high precision.
    """

    def __init__(self, *, low: bool, high: bool) -> None:
        super().__init__()
        self.sound, self.high_sound = not low, not high

    def answer(self, question: Question[object]) -> Answer:
        answer = super().answer(question)
        if not isinstance(question, ReplayStep):
            return answer
        seen = OneStep(
            loss=3.0 if self.sound else math.nan,
            high_loss=3.0 if self.high_sound else math.nan,
            grad_norm_ratio=1.0,
            finite=self.sound,
            high_finite=self.high_sound,
            grad_error=0.05,
            worst_error=0.05,
            floor=0.0,
        )
        return StepReplayed(seen=seen, replays=3)


def overflowing(loop: Loop, at: range, *, half: bool = False) -> list[Event]:
    """A healthy run of 150 steps, and then some of which are left out."""
    watch = machine(probe=None)
    state, events = run(watch, loop, lambda _: 3.0, 150)
    for step in range(150, at.stop):
        seen = StepSeen(at=step + 1, signals=signals(step, skipped=step in at), half=half)
        for happening in (Attempted(), seen, Boundary(at=step + 1, sound=step not in at)):
            state, more = tell(watch, state, happening, loop)
            events += more
    return events


def test_a_format_that_overflows_is_demoted_at_the_first_step_and_nothing_is_undone() -> None:
    loop = Overflows(low=True, high=False)
    events = overflowing(loop, range(160, 161))
    (demotion,) = kinds(events, Demotion)
    assert demotion.step == 161
    assert not kinds(events, Rollback)
    assert ReplayStep(batch=160) in loop.asked
    assert [q.batches for q in loop.asked if isinstance(q, Attribute)] == [(160,)]
    assert not any(isinstance(question, ReplayStretch) for question in loop.asked)


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(True, True, "comes from somewhere else"), (False, False, "cannot be reproduced")],
)
def test_others_faults_are_acquitted_by_one_batch(low: bool, high: bool, says: str) -> None:
    loop = Overflows(low=low, high=high)
    events = overflowing(loop, range(160, 161))
    assert not kinds(events, Demotion)
    assert says in kinds(events, Note)[-1].reason
    assert not any(isinstance(question, ReplayStretch) for question in loop.asked)


def test_data_with_inf_now_and_then_is_asked_about_at_growing_distance() -> None:
    loop = Overflows(low=True, high=True)
    events = overflowing(loop, range(160, 1160, 10))
    asked = [event.step for event in kinds(events, Suspicion)]
    assert asked == [161, 231, 361, 621, 1141]


def test_under_fp16_a_scale_that_is_tried_leaves_out_steps_as_well() -> None:
    loop = Overflows(low=True, high=False)
    assert not kinds(overflowing(loop, range(160, 161), half=True), Demotion)


def test_where_nothing_can_be_replayed_nothing_is_blamed() -> None:
    loop = Overflows(low=True, high=False)
    loop.replayable = False
    assert not kinds(overflowing(loop, range(160, 161)), Demotion)


def test_when_the_next_look_is_stands_in_checkpoints() -> None:
    watch, loop = machine(probe=None), Overflows(low=True, high=True)
    state, _ = run(watch, loop, lambda _: 3.0, 150)
    seen = StepSeen(at=151, signals=signals(150, skipped=True))
    state, _ = tell(watch, state, seen, loop)
    assert (state.skip_looks, state.skip_look_next) == (1, 151 + 64)
    again = watch.load_state_dict(watch.state_dict(state))
    assert again == replace(state, misbehaving=again.misbehaving)
