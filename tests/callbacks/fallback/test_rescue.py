"""What the fallback saves, and what it leaves alone: a little here, all of it by `make proof`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache

import pytest

from lightning_fp.demo.faults import Trial, trial
from lightning_fp.demo.faults.trial import HEALTHY, Arm

PRECISION = ["outliers", "gradient-overflow", "stuck-scale"]
"""Growing outliers, which make no spike; gradients that overflow; a scale stuck too high."""
OTHER = ["learning-rate", "nan-data", "shuffled-labels"]
MORE = ["forward-drift", "backward-zero", "gradient-bursts", "forward-noise", "backward-clamp"]
"""Faults that no statistics of a cast can show, or in many layers at once."""
SEEDS = range(10)
BRIEF = 230
"""Steps of what is tried in every run of the tests: faults begin at 160."""


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.ERROR, "lightning_fp.fallback"):
        yield


@cache
def run(case: str, arm: Arm, seed: int) -> Trial:
    return trial(case, arm, seed)


def reference(seed: int) -> Trial:
    """High precision; it does not notice the faults of precision, bit for bit (test_faults.py)."""
    return run(HEALTHY, "high precision", seed)


def is_saved(case: str, seed: int) -> bool:
    rescued = run(case, "fallback", seed)
    return rescued.blamed and rescued.gap(reference(seed)) < 0.01


@pytest.mark.slow
def test_a_precision_fault_is_blamed_and_the_run_is_saved() -> None:
    rescued = trial("outliers", "fallback", 0, steps=BRIEF)
    assert rescued.blamed
    assert rescued.no_further_than_needed
    assert rescued.gap(trial(HEALTHY, "high precision", 0, steps=BRIEF)) < 0.01


@pytest.mark.slow
def test_precision_is_not_blamed_for_a_learning_rate() -> None:
    assert not trial("learning-rate", "fallback", 0, steps=BRIEF).blamed


@pytest.mark.slow
@pytest.mark.parametrize("case", PRECISION)
def test_nine_of_ten_seeds_are_saved(case: str) -> None:
    assert sum(is_saved(case, seed) for seed in SEEDS) >= 9
    needed = [run(case, "fallback", seed).no_further_than_needed for seed in SEEDS]
    assert sum(needed) >= 9


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_most_other_precision_faults_are_saved(case: str) -> None:
    assert sum(is_saved(case, seed) for seed in SEEDS) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHER)
def test_nine_of_ten_seeds_are_not_blamed(case: str) -> None:
    assert sum(run(case, "fallback", seed).blamed for seed in SEEDS) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_healthy_runs_keep_their_formats(seed: int) -> None:
    assert not run(HEALTHY, "fallback", seed).blamed
