from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from lightning_fp.study.sweep.findings import find
from lightning_fp.study.total_cost import RatePrice, TotalCost, expected_attempts, total_costs
from tests.study.cells import STEPS, row


def costs(low: list[dict], high: list[dict] | None = None) -> TotalCost:
    high = high or [row("bf16", 1e-3, seed, 2.5) for seed in range(8)]
    (cost,) = total_costs([*high, *low], find([*high, *low], STEPS))
    return cost


def test_a_format_that_trains_alike_pays_from_1_on() -> None:
    cost = costs([row("fp8-dynamic", 1e-3, seed, 2.5) for seed in range(8)])
    assert cost.break_even == pytest.approx(1.0)
    assert cost.low < 1.0 < cost.high
    assert cost.at(1.25) == pytest.approx(0.8)


def test_half_of_the_runs_fail_half_way() -> None:
    low = [row("fp8-dynamic", 1e-3, seed, 2.5 if seed % 2 else None) for seed in range(8)]
    cost = costs(low)
    assert cost.attempts == pytest.approx(1.5)  # one failure in the mean, of half a run
    assert cost.break_even == pytest.approx(1.5)
    assert "pays above 1.50x" in cost.sentence()
    assert "at 3.00x a run costs 0.50 of bf16's" in cost.sentence(3.0)


def test_against_simulated_retries() -> None:
    """The formula, and what a thousand users would have paid who do as it says."""
    prices = [
        RatePrice(failed=6, runs=10, lost=0.4, steps=1.0),
        RatePrice(failed=1, runs=10, lost=0.9, steps=1.0),
    ]
    dice = random.Random(0)
    paid = []
    for _ in range(20_000):
        spent, at = 0.0, 0
        while dice.random() < prices[at].failed / 10:
            spent += prices[at].lost
            at = 1 if at == 0 else at  # lower is cheaper here than again
        paid.append(spent + 1.0)
    expected = expected_attempts(prices, [0.6, 0.1])
    assert expected <= 1 + 0.6 / 0.4 * 0.4  # trying again at the first rate
    assert sum(paid) / len(paid) == pytest.approx(expected, rel=0.02)


def test_rates_at_which_everything_fails_are_walked_through() -> None:
    prices = [
        RatePrice(failed=4, runs=4, lost=0.5, steps=math.inf),
        RatePrice(failed=0, runs=4, lost=1.0, steps=1.0),
    ]
    assert expected_attempts(prices, [1.0, 0.0]) == pytest.approx(1.5)
    assert expected_attempts(prices[:1], [1.0]) == math.inf
    assert expected_attempts([], []) == math.inf


def test_what_a_fallback_does_is_paid_for() -> None:
    changes = {"kept": 0.8, "replayed": 5, "rolled_back": 5}
    cost = costs([row("fp8-dynamic", 1e-3, seed, 2.5, **changes) for seed in range(8)])
    assert cost.at(1.0) == pytest.approx(1.1 / 0.9)
    assert cost.at(cost.break_even) == pytest.approx(1.0)
    assert cost.break_even > 1.3


def test_a_loss_that_is_never_reached_pays_at_no_speed() -> None:
    cost = costs([row("e8m3", 1e-3, seed, 2.6) for seed in range(8)])
    assert cost.break_even == math.inf
    assert "does not pay at any speed-up" in cost.sentence()


def test_more_is_lost_than_any_speed_wins() -> None:
    cost = costs([row("fp8-dynamic", 1e-3, s, 2.5, kept=0.2, replayed=20) for s in range(8)])
    assert cost.break_even == math.inf
    assert "more is lost" in cost.sentence(2.0)


def test_without_high_precision_there_is_nothing_to_compare_with() -> None:
    low = [row("fp8-dynamic", 1e-3, seed, 2.5) for seed in range(3)]
    assert total_costs(low, find(low, STEPS)) == []
    broken = [row("bf16", 1e-3, seed, None) for seed in range(3)]
    assert total_costs([*broken, *low], find([*broken, *low], STEPS)) == []


def test_a_setting_without_high_precision_is_left_out() -> None:
    rows = [row(name, 1e-2, 0, 1.0) for name in ("bf16", "fp8-dynamic")]
    alone = row("fp8-dynamic", 1e-2, 0, 1.0, setting="clip 1")
    broken = row("bf16", 1e-2, 0, 1.0, setting="clip 1", error="RuntimeError: out of something")
    rows += [alone, broken]
    (cost,) = total_costs(rows, find(rows, 100))
    assert (cost.format, cost.setting) == ("fp8-dynamic", "")


def test_intervals_without_bound_are_said() -> None:
    cost = costs([row("fp8-dynamic", 1e-3, seed, 2.5) for seed in range(2)])
    assert "no bound" in replace(cost, high=math.inf).sentence()
