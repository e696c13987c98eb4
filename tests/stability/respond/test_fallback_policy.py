"""The fallback's states: every transition, and what holds over any run."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any, get_args

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lightning_fp.stability.respond.fallback_policy import (
    MOST_DOUBLINGS,
    Fallback,
    FallbackPolicy,
    FallbackState,
    Phase,
    Signals,
)

FORMATS = {"blocks.0.fc1": "fp8-delayed"}


def quiet(step: int, **others: Any) -> Signals:
    return Signals(**{"step": step, "armed": True, "suspicious": False, **others})


def loud(step: int, **others: Any) -> Signals:
    return quiet(step, suspicious=True, **others)


def saved_and_loaded(fallback: Fallback, state: FallbackState) -> FallbackState:
    file = io.BytesIO()
    torch.save(fallback.state_dict(state), file)
    file.seek(0)
    loaded = fallback.load_state_dict(torch.load(file, weights_only=True))
    assert loaded == state
    return loaded


def at(phase: Phase, fallback: Fallback, step: int = 100) -> FallbackState:
    """A state on the way that leads there."""
    state = fallback.init()
    if phase == "warmup":
        return state
    state, _ = fallback.step(state, quiet(step))
    if phase == "healthy":
        return state
    state, action = fallback.step(state, loud(step))
    assert action == "investigate"
    if phase == "suspect":
        return state
    state = fallback.convicted(state, step, FORMATS)
    while phase == "permanent" and state.phase != "permanent":
        step += 1
        state, _ = fallback.step(state, loud(step))
        state = fallback.convicted(state, step, FORMATS)
    assert state.phase == phase
    return state


# -- warm-up ------------------------------------------------------------------------------------


def test_warm_up_ends_when_the_detector_is_armed() -> None:
    fallback = Fallback()
    state, action = fallback.step(fallback.init(3), quiet(10, armed=False))
    assert (state.phase, state.since, action) == ("warmup", 3, "none")
    state, action = fallback.step(state, quiet(64))
    assert (state.phase, state.since, action) == ("healthy", 64, "none")


def test_in_warm_up_only_a_run_that_cannot_step_is_suspicious() -> None:
    fallback = Fallback(FallbackPolicy(max_skips=2))
    state = fallback.init()
    assert fallback.step(state, loud(10, armed=False)) == (state, "none")
    assert fallback.step(state, quiet(10, armed=False, skips=2)) == (state, "none")
    stuck, action = fallback.step(state, quiet(10, armed=False, skips=3))
    assert (stuck.phase, stuck.onset, action) == ("suspect", 7, "investigate")


# -- suspicion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["healthy", "suspect", "probation"])
def test_a_suspicion_is_investigated_at_once(phase: Phase) -> None:
    fallback = Fallback()
    state, action = fallback.step(at(phase, fallback), loud(200, onset=190))
    assert (state.phase, action) == ("suspect", "investigate")
    assert state.onset == (100 if phase == "suspect" else 190)  # an open incident keeps its own


def test_a_suspicion_that_is_older_moves_the_begin_of_the_incident() -> None:
    fallback = Fallback()
    state, _ = fallback.step(at("suspect", fallback), loud(120, onset=80))
    assert state.onset == 80


def test_too_many_skips_are_a_suspicion_that_began_with_the_first() -> None:
    fallback = Fallback()
    state = at("healthy", fallback)
    for skips in (1, 2, 3):
        state, action = fallback.step(state, quiet(200 + skips, skips=skips))
        assert (state.phase, action) == ("healthy", "none")
    state, action = fallback.step(state, quiet(204, skips=4))
    assert (state.phase, state.onset, action) == ("suspect", 200, "investigate")


@pytest.mark.parametrize("demoted", [False, True])
def test_a_suspicion_that_goes_away_ends_the_incident(demoted: bool) -> None:
    fallback = Fallback()
    state = at("probation" if demoted else "healthy", fallback)
    state, _ = fallback.step(state, loud(200))
    state = fallback.unclear(state, 200)
    state, action = fallback.step(state, quiet(201))
    assert (state.phase, action) == ("suspect", "none")  # not before the next look was due
    state, action = fallback.step(state, quiet(300))
    assert (state.phase, action) == ("probation" if demoted else "healthy", "none")
    assert (state.onset, state.doubts, state.since) == (None, 0, 300)


# -- waits --------------------------------------------------------------------------------------


def waits(fallback: Fallback, state: FallbackState, verdict: str, count: int) -> list[int]:
    """Steps from one investigation to the next of a suspicion that lasts."""
    last, found = 1000, []
    state, action = fallback.step(state, loud(last))
    assert action == "investigate"
    for _ in range(count):
        judged = getattr(fallback, verdict)(state, last)
        step, action = last, "none"
        while action == "none":
            step += 1
            state, action = fallback.step(judged, loud(step))
        found.append(step - last)
        last = step
    return found


def test_what_is_unclear_is_looked_at_again_soon_and_then_after_the_grace() -> None:
    fallback = Fallback(FallbackPolicy(grace=48))
    assert waits(fallback, at("healthy", fallback), "unclear", 6) == [6, 12, 24, 48, 48, 48]
    shortest = Fallback(FallbackPolicy(grace=1))
    assert waits(shortest, at("healthy", shortest), "unclear", 3) == [1, 1, 1]


def test_a_new_incident_is_looked_at_soon_again() -> None:
    fallback = Fallback(FallbackPolicy(grace=48))
    state = at("suspect", fallback)
    for step in (100, 200, 300):
        state = fallback.unclear(state, step)
    state, _ = fallback.step(state, quiet(400))
    assert waits(fallback, state, "unclear", 1) == [6]


def test_waits_double_after_every_verdict_against_precision() -> None:
    fallback = Fallback(FallbackPolicy(grace=2))
    most = 2 * 2**MOST_DOUBLINGS
    found = waits(fallback, at("healthy", fallback), "acquitted", MOST_DOUBLINGS + 3)
    assert found == [2 * 2**i for i in range(MOST_DOUBLINGS + 1)] + [most, most]


def test_a_run_that_was_quiet_for_long_is_watched_as_before() -> None:
    fallback = Fallback(FallbackPolicy(grace=10))
    state = fallback.acquitted(at("suspect", fallback), 100)
    assert (state.acquittals, state.quiet_until) == (1, 110)
    again = fallback.acquitted(fallback.step(state, loud(120))[0], 120)
    assert (again.acquittals, again.quiet_until) == (2, 140)
    later = fallback.acquitted(fallback.step(again, loud(180))[0], 180)
    assert (later.acquittals, later.quiet_until) == (1, 190)


def test_the_next_conviction_is_not_delayed_by_the_last() -> None:
    fallback = Fallback()
    state = fallback.unclear(at("suspect", fallback), 100)
    state = fallback.convicted(state, 106, FORMATS)
    assert (state.acquittals, state.doubts, state.quiet_until) == (0, 0, 106)
    assert fallback.step(state, loud(107))[1] == "investigate"


# -- verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"), [("healthy", "healthy"), ("probation", "probation"), ("warmup", "healthy")]
)
def test_acquitted(before: Phase, after: Phase) -> None:
    fallback = Fallback()
    state, _ = fallback.step(at(before, fallback), loud(200, skips=9))
    state = fallback.acquitted(state, 200)
    assert (state.phase, state.since, state.onset) == (after, 200, None)
    assert state.demoted == (FORMATS if after == "probation" else {})


def test_convicted_again_and_again() -> None:
    """Culprits, their group, everything; and after the last time for good."""
    fallback = Fallback(FallbackPolicy(max_demotions=4, hold=10))
    state, scopes = at("healthy", fallback), []
    for index in range(4):
        step = 200 + index
        state, action = fallback.step(state, loud(step))
        assert action == "investigate"
        scopes.append((fallback.scope(state), fallback.gives_up(state)))
        state = fallback.convicted(state, step, {"a": f"format {index}", f"b{index}": "fp8"})
    assert scopes == [("layers", False), ("group", False), ("all", False), ("all", True)]
    assert state.phase == "permanent"
    assert state.demotions == 4
    # each layer's own format is the one it had before the first time
    assert state.demoted == {"a": "format 0", **{f"b{i}": "fp8" for i in range(4)}}


@pytest.mark.parametrize("max_demotions", [1, 2, 3])
def test_for_good_is_for_good(max_demotions: int) -> None:
    fallback = Fallback(FallbackPolicy(max_demotions=max_demotions))
    state = at("permanent", fallback)
    assert state.demotions == max_demotions
    for signals in (loud(10**6), quiet(10**6), quiet(10**6, skips=99)):
        assert fallback.step(state, signals) == (state, "none")


def test_promotion_after_probation_that_doubles() -> None:
    fallback = Fallback(FallbackPolicy(hold=100, max_demotions=5))
    state, step, held = at("healthy", fallback), 1000, []
    for _ in range(3):
        state, _ = fallback.step(state, loud(step))
        state = fallback.convicted(state, step, FORMATS)
        since, action = step, "none"
        while action == "none":
            step += 1
            state, action = fallback.step(state, quiet(step))
        assert action == "promote"
        held.append(step - since)
        state = fallback.promoted(state, step)
        assert (state.phase, state.demoted, state.since) == ("healthy", {}, step)
        assert fallback.scope(state) == "layers"
    assert held == [100, 200, 400]
    assert state.demotions == 3


def test_a_suspicion_restarts_probation() -> None:
    fallback = Fallback(FallbackPolicy(hold=100, grace=8))
    state = at("probation", fallback, 100)
    state, _ = fallback.step(state, loud(190))
    state = fallback.acquitted(state, 190)
    assert fallback.step(state, quiet(210))[1] == "none"
    assert fallback.step(state, quiet(290))[1] == "promote"


# -- configuration and state --------------------------------------------------------------------


@pytest.mark.parametrize("field", ["grace", "hold", "max_demotions", "max_skips"])
@pytest.mark.parametrize("value", [0, -1, 1.5, None])
def test_a_policy_out_of_range_is_refused(field: str, value: Any) -> None:
    must = "an integer of at least 1" if isinstance(value, int) else "a whole number"
    with pytest.raises(ValueError, match=f"{field} must be {must}, got {value}"):
        FallbackPolicy(**{field: value})


@pytest.mark.parametrize("phase", ["warmup", "healthy", "suspect", "probation", "permanent"])
def test_a_loaded_state_goes_on_alike(phase: Phase) -> None:
    fallback = Fallback()
    state = at(phase, fallback)
    loaded = saved_and_loaded(fallback, state)
    for step in range(200, 900, 7):
        signals = loud(step) if step % 5 == 0 else quiet(step, skips=step % 6)
        state, action = fallback.step(state, signals)
        loaded, again = fallback.step(loaded, signals)
        assert (state, action) == (loaded, again)


def test_a_state_of_another_version_is_refused() -> None:
    fallback = Fallback()
    saved = fallback.state_dict(fallback.init())
    with pytest.raises(ValueError, match="must have version 1, got 2"):
        fallback.load_state_dict({**saved, "version": 2})
    with pytest.raises(ValueError, match="must have version 1, got None"):
        fallback.load_state_dict({})


# -- any run ------------------------------------------------------------------------------------

LEGAL: dict[Phase, set[Phase]] = {
    "warmup": {"warmup", "healthy", "suspect"},
    "healthy": {"healthy", "suspect"},
    "suspect": {"suspect", "healthy", "probation"},
    "probation": {"probation", "suspect"},
    "permanent": {"permanent"},
}
"""From one step to the next."""

VERDICTS: dict[str, set[Phase]] = {
    "convicted": {"probation", "permanent"},
    "acquitted": {"healthy", "probation"},
    "unclear": {"suspect"},
}


class AnyRun(RuleBasedStateMachine):
    """Any signals, any verdicts, saved and loaded at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.fallback = Fallback(FallbackPolicy(grace=5, hold=20, max_demotions=3, max_skips=2))
        self.state = self.fallback.init()
        self.now = 0
        self.demotions = 0

    @rule(
        steps=st.integers(1, 30),
        armed=st.booleans(),
        suspicious=st.booleans(),
        skips=st.integers(0, 4),
        age=st.none() | st.integers(0, 20),
        verdict=st.sampled_from(["convicted", "acquitted", "unclear"]),
    )
    def step(
        self, steps: int, armed: bool, suspicious: bool, skips: int, age: int | None, verdict: str
    ) -> None:
        self.now += steps
        before = self.state
        frozen = asdict(before)
        signals = Signals(
            step=self.now,
            armed=armed,
            suspicious=suspicious,
            onset=None if age is None else self.now - age,
            skips=skips,
        )
        state, action = self.fallback.step(before, signals)
        assert asdict(before) == frozen
        assert state.phase in LEGAL[before.phase]
        if action == "investigate":
            assert self.now >= before.quiet_until
            assert state.phase == "suspect"
            assert state.onset is not None
            assert state.onset <= self.now
            if verdict == "convicted":
                self.demotions += 1
                name = f"layer {self.demotions}"
                state = self.fallback.convicted(state, self.now, {name: "fp8-delayed"})
                assert name in state.demoted
            else:
                state = getattr(self.fallback, verdict)(state, self.now)
                assert state.quiet_until > self.now
                assert state.demoted == before.demoted
            assert state.phase in VERDICTS[verdict]
        elif action == "promote":
            assert before.phase == "probation"
            assert self.now - before.since >= self.fallback.hold(before)
            state = self.fallback.promoted(state, self.now)
            assert state.phase == "healthy"
        self.state = state

    @rule()
    def save_and_load(self) -> None:
        self.state = saved_and_loaded(self.fallback, self.state)

    @invariant()
    def demotions_are_bounded(self) -> None:
        assert self.state.demotions == self.demotions <= 3
        assert (self.state.phase == "permanent") == (self.demotions == 3)

    @invariant()
    def the_phase_is_known_and_tells_what_is_demoted(self) -> None:
        assert self.state.phase in get_args(Phase)
        if self.state.phase in ("warmup", "healthy"):
            assert not self.state.demoted
        if self.state.phase in ("probation", "permanent"):
            assert self.state.demoted

    @invariant()
    def an_incident_has_a_begin(self) -> None:
        assert (self.state.onset is not None) == (self.state.phase == "suspect")


TestAnyRun = AnyRun.TestCase
TestAnyRun.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
