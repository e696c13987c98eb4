"""The forward gap: what convicts, what alarms, and when more batches are wanted."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fp.stability.replay.gap import (
    ALARM,
    BATCHES,
    MOST_BATCHES,
    Gap,
    measure_gap,
)

LOSSES = [2.31, 2.18, 2.42, 2.27, 2.36, 2.2, 2.29, 2.4]


def shifted(*shares: float) -> Gap:
    """Each batch's loss in the run's formats is larger by a share of the mean loss."""
    high = LOSSES[: len(shares)]
    unit = sum(high) / len(high)
    low = [h + s * unit for h, s in zip(high, shares, strict=True)]
    return measure_gap(low, high, least=0.5)


def test_numbers_of_a_look() -> None:
    gap = shifted(0.01, 0.02, 0.03, 0.02)
    assert (gap.count, gap.mean, gap.worst) == pytest.approx((4, 0.02, 0.03))
    assert gap.error == pytest.approx(0.008164966 / 2)
    assert gap.numbers["gap"] == gap.mean
    assert gap.sentence.endswith("the loss is 2.0% lower in high precision")
    assert shifted(0.0004).sentence.endswith("the loss is that of high precision")


def test_a_steady_cost_convicts() -> None:
    gap = shifted(*(0.025 + 0.002 * (i % 3) for i in range(8)))
    assert gap.convicts
    assert gap.alarming
    assert gap.wants is None


def test_weights_that_have_adapted_alarm_and_do_not_convict() -> None:
    gap = shifted(*(-0.05 + 0.002 * (i % 3) for i in range(8)))
    assert gap.alarming
    assert not gap.convicts
    assert gap.wants is None
    assert "higher" in gap.sentence


def test_what_healthy_runs_show_does_neither() -> None:
    worst_mean = shifted(*([0.0036] * 7), 0.0097)
    assert worst_mean.calm
    assert not worst_mean.convicts
    assert not worst_mean.alarming


def test_a_noisy_cost_wants_more_batches_up_to_a_bound() -> None:
    shares = [0.001, 0.029, 0.002, 0.028, 0.0, 0.027, 0.001, 0.029]
    gap = shifted(*shares)
    assert gap.alarming
    assert not gap.convicts
    assert gap.wants == 2 * BATCHES
    high = LOSSES * 4
    assert measure_gap([h + 2.3 * s for h, s in zip(high, shares * 4, strict=True)], high).convicts
    uncertain = Gap(count=MOST_BATCHES, mean=0.012, error=0.004, worst=0.02)
    assert uncertain.wants is None


def test_one_batch_convicts_where_it_tells() -> None:
    assert shifted(0.035).convicts
    assert not shifted(0.025).convicts
    assert shifted(0.035, *([0.0] * 7)).convicts
    small = measure_gap([0.024], [0.02], least=0.05)
    assert small.worst == pytest.approx(0.004 / 0.05)
    assert not small.convicts
    assert measure_gap([0.046], [0.02], least=0.05).convicts
    assert measure_gap([2.1], [2.0], least=0.05).convicts
    assert not measure_gap([2.1], [2.0]).convicts  # nobody knows what is small


def test_a_small_loss_is_measured_by_what_is_small() -> None:
    gap = measure_gap([0.00105] * 8, [0.001] * 8, least=0.01)
    assert gap.mean == pytest.approx(0.005)
    assert not gap.convicts


def test_around_zero_batches_that_scatter_convict_nobody() -> None:
    """A regression's loss minus a term of its own: one batch of eight is up by 4%, none in sum."""
    low = [0.0018, 0.0034, 0.0196, 0.0039, -0.0006, -0.0022, 0.0181, -0.0034]
    high = [0.0048, 0.0014, 0.0134, 0.0066, 0.0, -0.0016, 0.0208, -0.0042]
    gap = measure_gap(low, high, least=0.139)
    assert gap.worst > 0.03
    assert abs(gap.mean) < 0.001
    assert not gap.convicts
    assert not gap.alarming


def test_batches_that_go_either_way_convict_nobody_by_one() -> None:
    """A policy samples another action where a rounding makes the difference."""
    shares = [-0.1, 0.13, 0.0, 0.01, -0.08, 0.002, 0.0, 0.02]
    assert not shifted(*shares).convicts
    assert shifted(*[max(share, -0.01) for share in shares]).convicts


def test_inf_or_nan_in_the_formats_alone_convicts_of_any_loss() -> None:
    for bad in (math.inf, math.nan):
        gap = measure_gap([*LOSSES[:7], bad], LOSSES)
        assert gap.convicts
        assert gap.alarming
        assert "high precision only" in gap.sentence


def test_a_batch_that_is_bad_in_high_precision_too_says_nothing() -> None:
    gap = measure_gap([math.nan, *LOSSES[1:]], [math.nan, *LOSSES[1:]])
    assert (gap.count, gap.mean) == (7, 0)
    nothing = measure_gap([math.nan], [math.inf])
    assert (nothing.alarming, nothing.calm, nothing.convicts) == (False, False, False)
    assert nothing.wants == BATCHES


def test_healthy_noise_convicts_no_more_often_than_stated() -> None:
    """At 0.5%, the largest gap that counts as harmless, with all the questions that it leads to."""
    rng = random.Random(0)
    convicted = 0
    for _ in range(5000):
        shares: list[float] = []
        wanted: int | None = BATCHES
        while wanted is not None:
            shares += [rng.gauss(0.005, 0.004) for _ in range(wanted - len(shares))]
            gap = measure_gap([2 + 2 * s for s in shares], [2.0] * len(shares))
            if gap.convicts:
                convicted += gap.worst <= 0.03
                break
            wanted = gap.wants
    assert convicted <= 10


@given(
    st.lists(st.floats(-0.2, 0.2), min_size=1, max_size=40),
    st.floats(1e-3, 1e3),
)
def test_laws(shares: list[float], scale: float) -> None:
    high = [scale] * len(shares)
    gap = measure_gap([scale * (1 + s) for s in shares], high)
    assert not gap.convicts or gap.worst > ALARM  # never without a cost
    assert gap.calm != gap.alarming
    assert gap.wants is None or BATCHES <= gap.wants <= MOST_BATCHES
    assert not (gap.convicts and gap.wants)
    turned = measure_gap(high, [scale * (1 + s) for s in shares])
    assert not (turned.convicts and gap.convicts and len(shares) == 1)
