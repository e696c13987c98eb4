"""The control: what it does not repeat is no proof."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fp.stability.replay.control import first_difference, judge_control

HIGH = [2.0 - 0.01 * step for step in range(32)]


def harmed(share: float = 1.0, since: int = 10) -> list[float]:
    """A loss that rises from a step on, by a share of what the record shows."""
    return [h + share * 0.05 * max(0, step - since) for step, h in enumerate(HIGH)]


def test_a_format_at_fault_repeats() -> None:
    seen = judge_control(harmed(), harmed(), HIGH)
    assert (seen.finding, seen.share, seen.first_difference) == ("repeats", 1.0, None)
    assert "all of the harm" in seen.reason


def test_a_flipped_bit_does_not_and_its_step_is_named() -> None:
    control = [h * 1.00001 for h in HIGH]
    control[:11] = harmed()[:11]
    seen = judge_control(harmed(), control, HIGH, steps=range(100, 132))
    assert seen.finding == "not reproducible"
    assert seen.share < 0.004
    assert seen.first_difference == 111
    assert "from step 111 on" in seen.reason


@pytest.mark.parametrize(
    ("share", "finding"),
    [
        (1.3, "repeats"),
        (0.51, "repeats"),
        (0.35, "unclear"),
        (0.19, "not reproducible"),
        (-0.1, "not reproducible"),
    ],
)
def test_between_the_bounds_it_is_unclear(share: float, finding: str) -> None:
    assert judge_control(harmed(), harmed(share), HIGH).finding == finding


def test_inf_and_nan() -> None:
    lost = [*HIGH[:28], *[math.nan] * 4]
    assert judge_control(lost, lost, HIGH).finding == "repeats"
    seen = judge_control(lost, HIGH, HIGH)
    assert (seen.finding, seen.first_difference) == ("not reproducible", 28)
    assert seen.difference == math.inf
    assert judge_control(harmed(), lost, HIGH).finding == "repeats"


def test_without_harm_there_is_nothing_to_repeat() -> None:
    for high in (HIGH, harmed(), [math.nan] * 32, [None] * 32):
        assert judge_control(HIGH, HIGH, high).finding == "unclear"


def test_noise_of_sums_in_another_order_hides_no_event() -> None:
    noise = [h * (1 + 1e-7 * (1.2**step)) for step, h in enumerate(HIGH)]
    assert first_difference(HIGH, noise) == 13  # a drift: the first beyond the tolerance
    assert first_difference(HIGH, HIGH) is None
    noise[20:] = [value * 1.02 for value in noise[20:]]
    assert first_difference(HIGH, noise) == 20
    grown = [*HIGH[:5], *(h + 1e-4 * 3**step for step, h in enumerate(HIGH[5:15]))]
    assert first_difference(HIGH[:15], grown) == 5


def test_losses_that_are_not_known_are_the_same() -> None:
    assert first_difference([None, 1.0, 2.0], [1.0, None, 2.0]) is None
    assert first_difference([1.0, math.nan], [1.0, math.inf]) is None


@given(
    st.floats(-1, 3),
    st.floats(0.01, 100),
    st.lists(st.floats(0.001, 0.5), min_size=8, max_size=40),
)
def test_the_share_is_that_of_the_harm_whatever_the_scale(
    share: float, scale: float, harm: list[float]
) -> None:
    high = [scale] * len(harm)
    record = [scale * (1 + h) for h in harm]
    control = [scale * (1 + share * h) for h in harm]
    seen = judge_control(record, control, high)
    assert seen.share == pytest.approx(share, abs=1e-6)
