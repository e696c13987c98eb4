"""The loss scale's course: as torch's where the two are the same, as its words say elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fp.stability.loss_scaling import LossScaling

PATTERNS = st.lists(st.booleans(), min_size=1, max_size=60)


def course(scaling: LossScaling, pattern: list[bool]) -> list[dict[str, float]]:
    state, seen = scaling.init(), []
    for bad in pattern:
        state = scaling.update(state, torch.tensor(bad))
        seen.append(state.numbers())
    return seen


@settings(max_examples=60, deadline=None)
@given(pattern=PATTERNS, interval=st.integers(1, 5), power=st.integers(4, 20))
def test_with_hysteresis_one_it_is_torchs(pattern: list[bool], interval: int, power: int) -> None:
    scaling = LossScaling(
        init_scale=2.0**power,
        growth_interval=interval,
        hysteresis=1,
        min_scale=2.0**-120,
        max_scale=2.0**100,
    )
    scale, clean = torch.tensor(2.0**power), torch.tensor(0, dtype=torch.int32)
    for bad, seen in zip(pattern, course(scaling, pattern), strict=True):
        found = torch.tensor(float(bad))
        torch._amp_update_scale_(scale, clean, found, 2.0, 0.5, interval)  # pyright: ignore
        assert (seen["scale"], seen["clean"]) == (float(scale), int(clean))


@settings(max_examples=60, deadline=None)
@given(
    pattern=PATTERNS,
    interval=st.integers(1, 4),
    hysteresis=st.integers(1, 4),
    low=st.integers(0, 4),
    high=st.integers(6, 9),
)
def test_hysteresis_and_bounds(
    pattern: list[bool], interval: int, hysteresis: int, low: int, high: int
) -> None:
    """Against a model in plain Python of what the fields say."""
    scaling = LossScaling(
        init_scale=2.0**5,
        growth_interval=interval,
        hysteresis=hysteresis,
        min_scale=2.0**low,
        max_scale=2.0**high,
    )
    power, clean, left, stuck, skipped = 5, 0, hysteresis, 0, 0
    for bad, seen in zip(pattern, course(scaling, pattern), strict=True):
        if bad:
            clean, left, skipped = 0, max(left - 1, 0), skipped + 1
            if left == 0:
                stuck += power == low
                power = max(power - 1, low)
        else:
            clean, stuck = clean + 1, 0
            if clean == interval:
                power, clean, left = min(power + 1, high), 0, hysteresis
        assert seen == {
            "scale": 2.0**power,
            "clean": clean,
            "patience": left,
            "stuck": stuck,
            "made": seen["made"],
            "skipped": skipped,
        }


@settings(max_examples=30, deadline=None)
@given(before=PATTERNS, after=PATTERNS)
def test_a_saved_state_goes_on_as_if_never_saved(before: list[bool], after: list[bool]) -> None:
    scaling = LossScaling(growth_interval=3, min_scale=2.0**14, max_scale=2.0**17)
    whole = course(scaling, before + after)[len(before) :]
    state = scaling.init()
    for bad in before:
        state = scaling.update(state, torch.tensor(bad))
    state = scaling.load_state_dict(scaling.state_dict(state))
    for bad, seen in zip(after, whole, strict=True):
        state = scaling.update(state, torch.tensor(bad))
        assert state.numbers() == seen


def test_a_static_scale_stays_and_says_when_it_overflows() -> None:
    seen = course(LossScaling.static(1024), [False] * 5 + [True, True])
    assert {numbers["scale"] for numbers in seen} == {1024}
    assert [numbers["stuck"] for numbers in seen][-2:] == [1, 2]


def test_states_of_torchs_scaler_are_read_and_written() -> None:
    torchs = torch.amp.GradScaler("cpu", init_scale=2.0**9)  # pyright: ignore
    torchs.load_state_dict({**torchs.state_dict(), "_growth_tracker": 7})
    scaling = LossScaling()
    state = scaling.load_state_dict(torchs.state_dict())
    assert (float(state.scale), int(state.clean)) == (2.0**9, 7)
    assert scaling.grad_scaler_state(state) == {**torchs.state_dict()}


def test_a_loaded_scale_is_kept_within_bounds() -> None:
    wild = dataclasses.replace(LossScaling(), max_scale=2.0**30, init_scale=2.0**30)
    saved = wild.state_dict(wild.init())
    assert float(LossScaling().load_state_dict(saved).scale) == 2.0**24
    assert float(LossScaling.static(8).load_state_dict(saved).scale) == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_scale": 0.0}, "init_scale must be positive"),
        ({"init_scale": float("inf")}, "init_scale must be positive and finite"),
        ({"min_scale": -1.0}, "min_scale must be positive"),
        ({"init_scale": 2.0**25}, "init_scale must be between min_scale and max_scale"),
        ({"growth_factor": 1.0}, "growth_factor must be more than 1"),
        ({"backoff_factor": 1.0}, "backoff_factor must be between 0 and 1"),
        ({"hysteresis": 0}, "hysteresis must be an integer of at least 1"),
        ({"growth_interval": 2.5}, "growth_interval must be a whole number"),
        ({"on_min_scale": "stop"}, "on_min_scale must be 'fallback' or 'raise'"),
    ],
)
def test_bad_values_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LossScaling(**changes)
    with pytest.raises(ValueError, match="version 1"):
        LossScaling().load_state_dict({"version": 2})
