"""Paired trajectories: decided early, wrong rarely, and not by chaos."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fp.stability.replay.paired import WINDOWS, judge_paired


def falling(steps: int, seed: int = 0) -> list[float]:
    """A loss as of a small language model: falling, with the batches' own differences."""
    rng = random.Random(seed)
    return [2.5 - 0.004 * step + rng.gauss(0, 0.08) for step in range(steps)]


def dearer(
    high: list[float], cost: Callable[[int], float], *, sd: float = 0.002, seed: int = 1
) -> list[float]:
    """The same run in formats that cost a share of the loss at each step."""
    rng = random.Random(seed)
    return [loss * (1 + cost(step) + rng.gauss(0, sd)) for step, loss in enumerate(high)]


def test_a_sharp_fault_is_decided_within_a_few_steps() -> None:
    high = falling(64)
    seen = judge_paired(dearer(high, lambda step: 0.06 * (step >= 20)), high)
    assert seen.finding == "harm"
    assert seen.decided is not None
    assert 20 <= seen.decided <= 25
    assert seen.gain > 0.02


def test_a_slow_fault_is_decided_in_the_end() -> None:
    high = falling(64)
    slow = dearer(high, lambda step: 0.0006 * step)
    placebo = dearer(slow, lambda _: 0.0, seed=2)
    seen = judge_paired(slow, high, placebo=placebo)
    assert seen.finding == "harm"
    assert seen.decided is not None
    assert seen.decided > 16
    assert judge_paired(slow[: seen.decided], high, placebo=placebo).finding == "unclear"


def test_healthy_stretches_are_rarely_wrong() -> None:
    wrong = 0
    for seed in range(150):
        high = falling(64, seed)
        low = dearer(high, lambda _: 0.002, sd=0.003, seed=1000 + seed)
        wrong += judge_paired(low, high).finding == "harm"
    assert wrong == 0


def test_chaos_is_told_by_the_placebo() -> None:
    """At a learning rate of 0.1 high precision gained 2.10% and the placebo 2.02%."""
    high = falling(64)
    low = dearer(high, lambda step: 0.021 * min(1, step / 16))
    blurred = [a * (1 - 0.0202 * min(1, step / 16)) for step, a in enumerate(low)]
    assert judge_paired(low, high).finding == "harm"
    seen = judge_paired(low, high, placebo=blurred)
    assert seen.finding == "unclear"
    assert "chance" in seen.reason
    assert judge_paired(low, high, placebo=[math.nan] * 64).finding == "unclear"


def test_a_gain_that_may_be_chaos_asks_for_a_placebo() -> None:
    high = falling(32)
    low = dearer(high, lambda _: 0.015, sd=0.001)
    seen = judge_paired(low, high)
    assert (seen.finding, seen.wants_placebo) == ("unclear", True)
    same = dearer(low, lambda _: 0.0, sd=0.001, seed=5)
    seen = judge_paired(low, high, placebo=same)
    assert (seen.finding, seen.wants_placebo) == ("harm", False)


def test_a_rise_that_high_precision_shares_is_none_of_precision() -> None:
    high = [2.0 + 0.01 * (-1) ** step + 0.15 * max(0, step - 19) for step in range(32)]
    low = dearer(high, lambda _: 0.0, sd=0.002)
    for steps in (24, 32):  # four steps of evidence are enough
        seen = judge_paired(low[:steps], high[:steps], baseline=2.0, error=0.02)
        assert seen.finding == "no harm"
        assert seen.decided == steps - 1
    assert judge_paired(low, high).finding == "unclear"  # nothing to explain


def test_runs_that_part_while_both_rise_show_no_harm() -> None:
    """A learning rate that is far too high: 3% apart, and both are going up."""
    high = [2.0 + 0.01 * (-1) ** step + 0.05 * max(0, step - 7) for step in range(32)]
    low = dearer(high, lambda step: 0.03 * (step >= 4), sd=0.001)
    assert judge_paired(low, high).finding == "harm"
    assert judge_paired(low, high, baseline=2.0, error=0.02).finding == "no harm"
    lost = [*low[:28], *[math.nan] * 4]
    assert judge_paired(lost, high, baseline=2.0, error=0.02).finding == "harm"


def test_gains_of_a_small_loss_are_shares_of_what_is_small() -> None:
    high = [1e-6 + 0.001 * (-1) ** step for step in range(32)]  # around zero
    low = [loss + 0.0005 for loss in high]
    assert judge_paired(low, high).finding == "harm"
    assert judge_paired(low, high, least=0.1).finding == "unclear"
    assert judge_paired([loss + 0.005 for loss in high], high, least=0.1).finding == "harm"


def test_inf_in_the_formats_alone_is_harm() -> None:
    high = falling(12)
    low = [*high[:8], *[math.inf] * 4]
    seen = judge_paired(low, high)
    assert (seen.finding, seen.decided, seen.gain) == ("harm", 11, math.inf)
    assert judge_paired(low, low).finding == "unclear"


def test_what_is_not_known_is_left_out() -> None:
    high = falling(40)
    low: list[float | None] = [*dearer(high, lambda _: 0.1)]
    low[::2] = [None] * 20
    assert judge_paired(low, high).decided == 2 * WINDOWS[0] - 1
    assert judge_paired([None] * 40, high).finding == "unclear"
    assert judge_paired([], []).finding == "unclear"


@given(
    st.lists(st.floats(0.5, 3.0), min_size=0, max_size=40),
    st.lists(st.floats(-0.05, 0.05), min_size=40, max_size=40),
)
def test_laws(high: list[float], shares: list[float]) -> None:
    low = [a * (1 + s) for a, s in zip(high, shares, strict=False)]
    seen = judge_paired(low, high)
    assert (seen.decided is not None) == (seen.finding != "unclear")
    if seen.finding == "harm":
        assert seen.gain > 0.02
        assert seen.decided is not None
        again = judge_paired(low[: seen.decided + 1], high)  # later steps change no decision
        assert again == seen
    assert judge_paired(high, high).finding == "unclear"


@pytest.mark.parametrize("window", WINDOWS)
def test_every_window_can_decide(window: int) -> None:
    high = [2.0] * window
    low = [2.0 * (1 + 0.03)] * window
    assert judge_paired(low, high).decided == WINDOWS[0] - 1
    noisy = [2.0 * (1 + 0.03 + 0.02 * (-1) ** step) for step in range(window)]
    found = judge_paired(noisy, high)
    assert found.finding == ("harm" if window == 32 else "unclear")
