"""Verdicts: convict what was measured to be precision's fault, and nothing else."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fp.stability.respond.verdict import (
    Anomaly,
    Finding,
    OneStep,
    judge_gradients,
    judge_one_step,
    judge_trajectory,
    wrong_gradients,
)

NOISE = 0.05
ANOMALY = Anomaly(baseline=2.55, noise=NOISE)
UNKNOWN = Anomaly()
PAIRED = 0.01
"""What is left of the noise between two runs over the same batches, measured on a tiny GPT."""


def batches(rng: random.Random, count: int) -> list[float]:
    """What each batch adds to the loss of any run."""
    return [rng.gauss(0, NOISE) for _ in range(count)]


def run(level: Sequence[float], noise: Sequence[float], rng: random.Random) -> list[float]:
    """Losses around a level, over given batches."""
    return [a + b + rng.gauss(0, PAIRED) for a, b in zip(level, noise, strict=True)]


def parting(end: float, other: float, seed: int = 0, count: int = 40) -> tuple[list[float], ...]:
    """A run and its replay that part within a quarter of the steps and then keep their levels."""
    rng = random.Random(seed)
    noise = batches(rng, count)
    ways = [min(1.0, 4 * (i + 1) / count) for i in range(count)]
    return tuple(run([2.55 + w * (x - 2.55) for w in ways], noise, rng) for x in (end, other))


def finding(live: Sequence[float | None], high: Sequence[float | None], a: Anomaly) -> Finding:
    return judge_trajectory(live, high, a).finding


# -- one step -----------------------------------------------------------------------------------


def one_step(loss: float, high: float, **others: float | bool) -> OneStep:
    values = {"finite": math.isfinite(loss), "high_finite": math.isfinite(high), **others}
    numbers = {"grad_norm_ratio": 1.0, "grad_error": 0.05, "worst_error": 0.1, "floor": 0.0}
    return OneStep(loss=loss, high_loss=high, **{**numbers, **values})  # pyright: ignore


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (one_step(math.nan, 2.5), "precision"),
        (one_step(2.5, 2.5, finite=False), "precision"),  # the gradients were not
        (one_step(math.inf, math.nan), "not precision"),
        (one_step(2.5, math.nan), "unclear"),
        (one_step(4.0, 2.6), "precision"),
        (one_step(4.0, 3.9), "unclear"),
        (one_step(2.6, 2.4), "unclear"),  # no rise above the noise
        (one_step(2.5, 2.5, grad_error=0.9), "unclear"),
    ],
)
def test_one_step(seen: OneStep, expected: Finding) -> None:
    verdict = judge_one_step(seen, ANOMALY)
    assert verdict.finding == expected
    assert verdict.numbers["grad_error"] == seen.grad_error


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (one_step(2.5, 2.5, grad_error=1.1, worst_error=2.1), True),
        (one_step(2.5, 2.5, grad_error=0.9, worst_error=9.0), False),  # of one layer alone
        (one_step(2.5, 2.5, grad_error=1.1, worst_error=1.9), False),
        (one_step(2.5, 2.5, grad_error=2.1, worst_error=3.0, floor=0.5), False),  # once only
        (one_step(2.8, 2.8, grad_error=50.0, worst_error=60.0), False),  # damaged weights
        (one_step(2.5, 2.5, grad_error=math.inf, worst_error=math.inf, high_finite=False), False),
        (one_step(2.5, 2.5, grad_error=math.inf, worst_error=math.inf, finite=False), False),
    ],
)
def test_gradients_that_no_sound_format_makes(seen: OneStep, expected: bool) -> None:
    assert wrong_gradients(seen, ANOMALY) is expected
    assert not wrong_gradients(seen, UNKNOWN)


def test_near_a_minimum_large_errors_of_the_gradients_are_usual() -> None:
    seen = one_step(2.5, 2.5, grad_error=5.0, worst_error=5.0)
    assert wrong_gradients(seen, ANOMALY, usual=0.45)
    assert not wrong_gradients(seen, ANOMALY, usual=0.6)


def test_gradients_that_vanish_are_measured_by_what_they_were() -> None:
    seen = one_step(2.5, 2.5, grad_error=5.0, worst_error=9.0, high_norm=0.01)
    assert wrong_gradients(seen, ANOMALY, usual_norm=0.01)
    assert wrong_gradients(seen, ANOMALY, usual_norm=0.04)
    assert not wrong_gradients(seen, ANOMALY, usual_norm=0.06)


def test_the_conviction_says_what_every_batch_shows() -> None:
    batches = [one_step(2.5, 2.5, grad_error=e, worst_error=2 * e) for e in (5.0, 1.5, 3.0)]
    verdict = judge_gradients(batches, 0.15)
    assert verdict.finding == "precision"
    assert "in each of 3 batches" in verdict.reason
    assert "at least 150%, and 300% in the worst layer" in verdict.reason
    assert verdict.numbers["grad_error"] == 5.0


@pytest.mark.parametrize("anomaly", [UNKNOWN, Anomaly(baseline=math.nan, noise=NOISE)])
def test_without_a_baseline_one_step_convicts_only_what_is_not_finite(anomaly: Anomaly) -> None:
    assert judge_one_step(one_step(9.0, 2.6), anomaly).finding == "unclear"
    assert judge_one_step(one_step(math.nan, 2.6), anomaly).finding == "precision"


# -- what was measured --------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", [2.45, 2.52, 2.55, 2.6, None])
@pytest.mark.parametrize("seed", range(20))
def test_clamped_gradients_are_precision(baseline: float | None, seed: int) -> None:
    """2.629 against 2.545 over 40 batches."""
    anomaly = UNKNOWN if baseline is None else Anomaly(baseline=baseline, noise=NOISE)
    found = finding(*parting(2.629, 2.545, seed), anomaly)
    # A baseline lower than what high precision reaches is not the whole story, and four steps
    # do not make a good one.
    assert found == "precision" or (baseline in (2.45, 2.52, None) and found == "unclear")


@pytest.mark.parametrize("baseline", [2.45, 2.55, 2.6, None])
@pytest.mark.parametrize("seed", range(20))
def test_truncation_is_not(baseline: float | None, seed: int) -> None:
    """2.558 against 2.545: a run survives that."""
    anomaly = UNKNOWN if baseline is None else Anomaly(baseline=baseline, noise=NOISE)
    assert finding(*parting(2.558, 2.545, seed), anomaly) != "precision"


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_a_blow_up_is_clear_as_soon_as_it_shows(steps: int) -> None:
    """Each step later costs: the first one over the noise is enough."""
    rng = random.Random(0)
    noise = batches(rng, 8 + steps)
    rise = [0.0] * 8 + [1.5 * 1.4**i for i in range(steps)]
    live, high = (run([2.55 + r for r in rises], noise, rng) for rises in (rise, [0.0] * len(rise)))
    assert finding(live, high, ANOMALY) == "precision"


@pytest.mark.parametrize(
    "losses",
    [
        [2.5] * 8 + [math.nan] * 4,
        [2.5] * 8 + [3.0, 9.0, math.inf, math.nan],
        [math.nan] * 12,  # every step was left out
    ],
)
@pytest.mark.parametrize("anomaly", [ANOMALY, UNKNOWN])
def test_inf_and_nan_in_low_precision_only(losses: list[float], anomaly: Anomaly) -> None:
    assert finding(losses, [2.5, 2.6] * 6, anomaly) == "precision"


# -- what is not precision ----------------------------------------------------------------------


def wild(rng: random.Random, growth: float, steps: int) -> tuple[list[float], list[float]]:
    """Two runs under a learning rate that is far too high, as measured on a tiny GPT: the rise
    grows and jumps, alike at first, and within ten steps the two differ by half."""
    log_rise, apart = math.log(0.5), [0.0, 0.0]
    losses: tuple[list[float], list[float]] = [], []
    for _ in range(steps):
        log_rise = max(math.log(0.3), log_rise + rng.gauss(growth, 0.4))
        for side in range(2):
            apart[side] = 0.95 * apart[side] + rng.gauss(0, 0.15)
            losses[side].append(2.55 + math.exp(log_rise + apart[side]))
    return losses


@pytest.mark.parametrize("growth", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16, 40])
def test_a_learning_rate_that_is_too_high_blames_nobody(growth: float, steps: int) -> None:
    blamed = {ANOMALY: 0, UNKNOWN: 0}
    for seed in range(200):
        rng = random.Random(seed)
        noise = batches(rng, 8 + steps)
        live, high = (run([2.55] * 8 + w, noise, rng) for w in wild(rng, growth, steps))
        for anomaly in blamed:
            blamed[anomaly] += finding(live, high, anomaly) == "precision"
    assert blamed[ANOMALY] == 0
    assert blamed[UNKNOWN] <= 1  # four steps do not make a good baseline


def test_two_walks_that_part_by_chance() -> None:
    """Coming by the baseline once is not enough for a run that was far from it."""
    rng = random.Random(0)
    noise = batches(rng, 40)
    live = run([2.55 + 0.1 * i for i in range(40)], noise, rng)
    high = run([2.55 + min(0.1 * i, max(0, 3.0 - 0.1 * i)) for i in range(40)], noise, rng)
    assert finding(live, high, ANOMALY) == "unclear"


@pytest.mark.parametrize("where", ["tail", "everywhere", "burst"])
def test_nan_in_the_data(where: str) -> None:
    at = {"tail": range(36, 40), "everywhere": range(40), "burst": range(20, 24)}[where]
    rng = random.Random(0)
    noise = batches(rng, 40)
    live, high = (run([2.55] * 40, noise, rng) for _ in range(2))
    for index in at:
        live[index] = high[index] = math.nan
    assert finding(live, high, ANOMALY) == "not precision"


@pytest.mark.parametrize("gain", [-0.05, 0.0, 0.01, 0.05])
@pytest.mark.parametrize("seed", range(10))
def test_shuffled_labels_raise_both(gain: float, seed: int) -> None:
    assert finding(*parting(5.5, 5.5 - gain, seed), ANOMALY) == "not precision"


def test_high_precision_that_fares_worse_acquits_nothing() -> None:
    assert finding([2.5] * 12, [2.5] * 8 + [math.nan] * 4, ANOMALY) == "unclear"
    mostly_low = [2.5] * 36 + [math.nan] * 4
    assert finding(mostly_low, [2.5] * 39 + [math.nan], ANOMALY) == "unclear"


# -- what does not tell -------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(4))
def test_few_steps_do_not_tell(count: int) -> None:
    assert finding([9.0] * count, [2.5] * count, ANOMALY) == "unclear"


def test_losses_that_are_not_known_say_nothing() -> None:
    live: list[float | None] = [*([2.5, 2.6] * 8)]
    late = [*live[:-1], None]  # the last one is still on its way from the device
    assert finding(late, live, ANOMALY) == "not precision"
    assert finding([None] * 16, live, UNKNOWN) == "unclear"
    assert finding(live, [math.nan if x is None else x for x in [None] * 16], UNKNOWN) == "unclear"


def test_a_replay_that_ended_early_is_compared_step_by_step() -> None:
    """Its last steps are not the run's last ones."""
    live = [2.55] * 10 + [8.0] * 10
    assert finding(live, [2.55] * 10, ANOMALY) == "not precision"


@pytest.mark.parametrize("share", [0.45, 0.55])
def test_neither_most_nor_little_of_the_rise(share: float) -> None:
    assert finding(*parting(3.55, 3.55 - share), ANOMALY) == "unclear"


def test_a_gain_short_of_the_baseline() -> None:
    """Most of the rise is gone, but something else is wrong as well."""
    assert finding(*parting(8.0, 3.5), ANOMALY) == "unclear"


@pytest.mark.parametrize("level", [0.0, -1.0, 1e-6, 1e4])
def test_any_level_of_the_loss(level: float) -> None:
    """Log-likelihoods of densities are negative."""
    scale = max(1.0, abs(level))
    high = [level + 1e-4 * scale * (i % 3) for i in range(40)]
    live = [x + 0.05 * scale for x in high]
    anomaly = Anomaly(baseline=level, noise=0.1 * scale)
    assert finding(high, high, anomaly) in ("not precision", "unclear")
    assert finding(live, high, anomaly) == "precision"


# -- laws ---------------------------------------------------------------------------------------

LOSS = st.floats(-10, 1e4) | st.sampled_from([math.inf, math.nan])
LOSSES = st.lists(LOSS, min_size=0, max_size=48)
ANOMALIES = st.just(UNKNOWN) | st.builds(
    Anomaly, baseline=st.floats(-10, 100), noise=st.floats(1e-3, 10)
)


@settings(max_examples=300)
@given(LOSSES, ANOMALIES)
def test_equal_trajectories_never_convict(losses: list[float], anomaly: Anomaly) -> None:
    assert finding(losses, losses, anomaly) != "precision"


@settings(max_examples=300)
@given(LOSSES, LOSSES, ANOMALIES)
def test_there_is_always_a_verdict_with_finite_or_plain_numbers(
    live: list[float], high: list[float], anomaly: Anomaly
) -> None:
    verdict = judge_trajectory(live, high, anomaly)
    assert verdict.finding in ("precision", "not precision", "unclear")
    assert verdict.numbers["steps"] == min(len(live), len(high))
    assert all(isinstance(value, (int, float)) for value in verdict.numbers.values())


@settings(max_examples=300)
@given(
    st.lists(st.floats(0, 1), min_size=4, max_size=48),
    st.floats(0, 2),
    st.floats(0, 5),
    st.floats(1e-3, 1),
    st.integers(0, 2**32),
)
def test_a_larger_gain_never_acquits(
    shape: list[float], gain: float, more: float, noise: float, seed: int
) -> None:
    """Losses of the run raised by a constant: from "precision" there is no way to "not"."""
    rng = random.Random(seed)
    high = [2.5 + noise * x for x in shape]
    live = [x + gain + rng.gauss(0, noise / 5) for x in high]
    anomaly = Anomaly(baseline=2.5, noise=noise)
    if finding(live, high, anomaly) == "precision":
        assert finding([x + more for x in live], high, anomaly) != "not precision"
