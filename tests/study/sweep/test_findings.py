from __future__ import annotations

import math
import random

import pytest

from lightning_fp.study.intervals import posterior, wilson
from lightning_fp.study.sweep.findings import ALIKE, find, first_below, stable_decades
from lightning_fp.study.sweep.verdict import LossJudge, curve_stretch
from lightning_fp.study.sweep.words import headline
from tests.study.cells import STEPS, row

LRS = (1e-3, 1e-2, 1e-1)
ROWS = [
    *(row("bf16", lr, seed, {1e-3: 2.5, 1e-2: 2.6, 1e-1: 3.5}[lr]) for lr in LRS for seed in "012"),
    *(
        row("e8m3", lr, seed, {1e-3: 2.6, 1e-2: 3.4, 1e-1: None}[lr])
        for lr in LRS
        for seed in "012"
    ),
]


def test_failures_ranges_and_gaps() -> None:
    bf16, e8m3 = find(ROWS, STEPS).formats
    # a tenth of the way from 5.5 to 2.5 may be missing: up to 2.8
    assert [rate.failed for rate in bf16.rates] == [0, 0, 3]
    assert [rate.failed for rate in e8m3.rates] == [0, 3, 3]
    assert [rate.diverged for rate in e8m3.rates] == [0, 0, 3]
    assert bf16.width == pytest.approx(1.5)
    assert e8m3.width == pytest.approx(0.5)
    assert e8m3.narrower == pytest.approx(1.0)
    assert e8m3.width_low < 0.5 < e8m3.width_high
    assert bf16.narrower is None
    assert bf16.best is not None
    assert bf16.best.lr == 1e-3
    assert e8m3.best_gap == pytest.approx(2.6 / 2.5 - 1)
    assert e8m3.rates[1].gap == pytest.approx(3.4 / 2.6 - 1)
    assert bf16.steps_to_reference == 49  # within 1% already
    assert e8m3.steps_to_reference == math.inf
    assert bf16.rates[0].spikes == 20


def test_a_lucky_stretch_is_not_the_loss_that_is_wanted() -> None:
    points = 200 // curve_stretch(200)
    lucky = [2.3 if index == 12 else 2.6 for index in range(points)]
    assert first_below(lucky, 2.5, 200) == math.inf
    there = [2.6 if index < 30 else 2.4 for index in range(points)]
    # of five stretches, a tenth of the run, three are low by then: the mean is 2.48
    assert first_below(there, 2.5, 200) == 33 * curve_stretch(200)


@pytest.mark.parametrize("steps", [7, 60, 149, 200, 1024])
def test_the_mean_is_over_as_many_steps_as_the_final_loss(steps: int) -> None:
    """So the run that the loss is of has come to it by its end, whatever its noise."""
    noise = random.Random(steps)
    judge = LossJudge(steps)
    for index in range(steps):
        judge.step(3.0 - index / steps + noise.gauss(0.0, 0.3), None, 1e-3)
    result = judge.result()
    reached = first_below(result["curve"], (1 + ALIKE) * result["final_loss"], steps)
    assert reached <= steps


def test_a_stretch_that_is_not_finite_is_not_below() -> None:
    curve = [None if index % 4 == 0 else 1.0 for index in range(50)]
    assert first_below(curve, 2.5, 200) == math.inf


def test_the_answer_in_words() -> None:
    said = headline(find(ROWS, STEPS))
    assert "bf16 failed in 3 of 9 runs" in said
    assert "e8m3 in 6 of 9" in said
    assert "4.00% higher" in said


def test_without_a_reference_only_divergence_counts() -> None:
    (e8m3,) = find([each for each in ROWS if each["format"] == "e8m3"], STEPS).formats
    assert [rate.failed for rate in e8m3.rates] == [0, 0, 3]
    assert e8m3.narrower is None
    assert "add bf16" in headline(find(ROWS[9:], STEPS))


def test_cells_that_could_not_run_count_nowhere() -> None:
    errors = [row("bf16", 1e-3, 9, None, error="out of memory")]
    found = find([*ROWS, *errors], STEPS)
    assert found.formats == find(ROWS, STEPS).formats
    assert found.errors == {"bf16-0.001-9": "out of memory"}


def test_nothing_has_run() -> None:
    assert find([], STEPS).formats == ()


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(hits: int, count: int, low: float, high: float) -> None:
    assert wilson(hits, count) == pytest.approx((low, high), abs=6e-5)


def test_posterior_intervals_cover() -> None:
    """Of one rate it is near Wilson's, and it holds what was counted, at the ends too."""
    for hits in range(6):
        low, high = posterior([(hits, 5)], lambda rates: rates[0])
        assert low <= hits / 5 <= high
        assert (low, high) == pytest.approx(wilson(hits, 5), abs=0.12)


def test_decades() -> None:
    assert stable_decades(LRS, [0, 0, 0]) == pytest.approx(2.0)
    assert stable_decades(LRS, [1, 1, 1]) == 0.0
