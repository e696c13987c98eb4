"""Open cases: asked again at growing distance, at once when the loss rises, closed in the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fp.stability.replay.gap import Gap
from lightning_fp.stability.respond.open_cases import CasesState, OpenCases

CASES = OpenCases()


def gap(mean: float) -> Gap:
    return Gap(count=8, mean=mean, error=0.001, worst=mean)


CALM, ALARM = gap(0.0), gap(0.02)


def asked_at(state: CasesState, start: int, steps: int, mean: float = 0.0) -> list[int]:
    found: list[int] = []
    for step in range(start, start + steps):
        if CASES.due(state, step):
            found.append(step - start)
            state = CASES.looked(state, step, gap(mean))
    return found


def test_calm_answers_make_it_rarer_and_close_it() -> None:
    state = CASES.acquitted(CASES.init(), 100, onset=90)
    assert asked_at(state, 100, 2000) == [4, 12, 28, 60, 124, 252, 508]


def test_doubtful_answers_keep_it_near() -> None:
    state = CASES.acquitted(CASES.init(), 100, onset=90)
    assert asked_at(state, 100, 21, 0.02) == [4, 8, 12, 16, 20]


def test_further_acquittals_double_the_distance_and_keep_the_beginning() -> None:
    state = CASES.acquitted(CASES.init(), 100, onset=90)
    state = CASES.acquitted(state, 104, onset=103)
    assert (state.began, state.wait) == (90, 8)
    assert not CASES.due(state, 111)
    assert CASES.due(state, 112)
    for step in range(200, 206):
        state = CASES.acquitted(state, step, onset=step)
    assert state.began is None


def test_a_rise_asks_at_once_and_not_at_every_step() -> None:
    state = CASES.acquitted(CASES.init(), 100, onset=90)
    for step in (104, 112, 128):
        state = CASES.looked(state, step, CALM)
    assert not CASES.due(state, 135)
    assert CASES.due(state, 135, risen=True)
    state = CASES.looked(state, 135, ALARM)
    assert not CASES.due(state, 136, risen=True)
    assert CASES.due(state, 139, risen=True)


def test_without_a_case_nothing_is_asked() -> None:
    assert not CASES.due(CASES.init(), 1000, risen=True)
    assert CASES.keep_from(CASES.init()) is None


def test_the_harm_began_after_the_last_calm_look() -> None:
    state = CASES.looked(CASES.init(), 64, CALM)
    assert CASES.onset(state, 100) == 64
    state = CASES.acquitted(state, 70, onset=60)
    assert CASES.onset(state, 100) == 64
    state = CASES.looked(state, 74, CALM)
    assert (CASES.onset(state, 100), CASES.keep_from(state)) == (74, 74)
    state = CASES.looked(state, 82, ALARM)
    assert CASES.onset(state, 100) == 74
    assert CASES.onset(CASES.init(), 100) == 0  # nothing speaks for any step


def test_on_its_way_through_zero_a_gap_is_not_calm() -> None:
    """Weights adapt to a fault: 3%, nothing, -5%."""
    state = CASES.acquitted(CASES.init(), 100, onset=90)
    state = CASES.looked(state, 104, ALARM)
    state = CASES.looked(state, 108, CALM)
    assert CASES.onset(state, 200) == 90
    state = CASES.looked(state, 112, CALM)
    assert CASES.onset(state, 200) == 112


def test_a_case_that_is_over_leaves_the_last_calm_look() -> None:
    state = CASES.looked(CASES.acquitted(CASES.init(), 100, onset=90), 104, CALM)
    state = CASES.closed(state)
    assert CASES.keep_from(state) is None
    assert CASES.onset(state, 200) == 104


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(-0.1, 0.1), st.booleans()), max_size=40))
def test_laws(events: list[tuple[int, float, bool]]) -> None:
    state, step = CASES.init(), 0
    for distance, mean, acquitted in events:
        step += distance
        if acquitted:
            state = CASES.acquitted(state, step, onset=step - 3)
        else:
            state = CASES.looked(state, step, gap(mean))
        assert CASES.load_state_dict(CASES.state_dict(state)) == state
        assert CASES.onset(state, step) <= step
        if state.began is not None:
            assert CASES.first <= state.wait <= CASES.longest
            assert CASES.due(state, state.asked + state.wait)
            assert state.began <= CASES.onset(state, step)


def test_options_out_of_range() -> None:
    with pytest.raises(ValueError, match="first must be from 1 to longest"):
        OpenCases(first=0)
    with pytest.raises(ValueError, match="first must be from 1 to longest"):
        OpenCases(first=300)
