"""Probes: when to look, and what is out of the usual."""

from __future__ import annotations

import io
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_fp.stability.respond.attribution import HEALTHY_ERROR
from lightning_fp.stability.respond.probe import (
    FIRST,
    LARGE,
    LARGEST,
    OFTEN,
    TIMES,
    Probe,
    ProbeState,
)


def probed_at(probe: Probe, steps: int, error: float | None = 0.05) -> list[int]:
    state, found = ProbeState(), []
    for step in range(steps):
        if probe.due(state, step):
            found.append(step)
            state = probe.seen(state, step, error)
    return found


@pytest.mark.parametrize("error", [0.05, 0.9, None])
def test_the_first_at_once_then_often_then_ever_rarer(error: float | None) -> None:
    found = probed_at(Probe(every_n_steps=1024), 9000, error)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert found[0] == 0
    assert gaps[:OFTEN] == [FIRST] * OFTEN
    assert gaps[OFTEN : OFTEN + 4] == [2 * FIRST, 4 * FIRST, 8 * FIRST, 1024]
    assert set(gaps[OFTEN + 4 :]) == {1024}


@pytest.mark.parametrize("every", [1, 10, 64, 100])
def test_never_rarer_than_asked_for(every: int) -> None:
    found = probed_at(Probe(every_n_steps=every), 3000)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert max(gaps) == every
    assert gaps == sorted(gaps)


def test_a_probe_that_was_missed_is_due_at_the_next_step() -> None:
    probe = Probe()
    state = probe.seen(ProbeState(), 10, 0.05)
    assert not probe.due(state, 10 + FIRST - 1)
    assert probe.due(state, 10 + FIRST)
    assert probe.due(state, 10 + 5 * FIRST)


def test_without_experience_only_a_large_error_is_suspicious() -> None:
    probe, state = Probe(), ProbeState()
    assert not probe.suspicious(state, LARGE)
    for error in (LARGE + 1e-6, 1.0, math.inf, math.nan):
        assert probe.suspicious(state, error)


@pytest.mark.parametrize("usual", [0.01, HEALTHY_ERROR, 0.2, 0.24, 0.45])
def test_then_one_that_is_a_multiple_of_the_usual(usual: float) -> None:
    probe, state = Probe(), ProbeState()
    for step in range(5):
        state = probe.seen(state, step, usual)
    assert probe.usual(state) == max(usual, HEALTHY_ERROR)
    limit = min(LARGEST, TIMES * probe.usual(state))
    assert not probe.suspicious(state, 0.99 * limit)
    assert probe.suspicious(state, 1.01 * limit)
    # gradients that are all lost have an error of 1, whatever was usual
    assert all(probe.suspicious(state, error) for error in (1.0, math.inf, math.nan))


def test_what_is_suspicious_never_becomes_usual() -> None:
    probe, state = Probe(), ProbeState()
    state = probe.seen(state, 0, 0.08)
    for step in range(1, 50):
        state = probe.seen(state, step, 0.9)
    assert state.errors == (0.08,)
    assert state.healthy == 0
    state = probe.seen(state, 60, None)  # it could not be done
    assert (state.errors, state.healthy, state.last) == ((0.08,), 0, 60)


def test_the_usual_error_may_grow_slowly() -> None:
    probe, state = Probe(), ProbeState()
    for step in range(64):
        error = 0.05 * 1.02**step
        assert not probe.suspicious(state, error)
        state = probe.seen(state, step, error)
    assert len(state.errors) == 16
    assert probe.usual(state) > 0.14


@given(st.lists(st.none() | st.floats(0, 2) | st.just(math.nan), max_size=30), st.integers(0, 29))
def test_a_loaded_state_goes_on_alike(errors: list[float | None], saved_at: int) -> None:
    probe = Probe(every_n_steps=256)
    state = loaded = ProbeState()
    step = 0
    for index, error in enumerate(errors):
        if index == saved_at:
            file = io.BytesIO()
            torch.save(probe.state_dict(state), file)
            file.seek(0)
            loaded = probe.load_state_dict(torch.load(file, weights_only=True))
        state, loaded = (probe.seen(s, step, error) for s in (state, loaded))
        if index < saved_at:
            loaded = state
        assert state == loaded
        step += state.wait


def test_an_error_stays_as_alarming_as_it_was():
    """That it has done no harm so far says nothing of later: 0.65 was accepted, and cost 15%."""
    probe = Probe()
    state = probe.seen(ProbeState(), 0, 0.1)
    for step in (64, 128, 192):
        assert probe.suspicious(state, 0.65)
        state = probe.seen(state, step, 0.65)
    assert probe.usual(state) == HEALTHY_ERROR
    old = {**probe.state_dict(state), "last_error": 0.65, "accepted": 0.65}
    assert probe.load_state_dict(old) == state
