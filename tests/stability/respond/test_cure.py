"""A cure counts only if loss and gradients are both as in a healthy run."""

from __future__ import annotations

import math

import pytest

from lightning_fp.stability.replay.gap import Gap, measure_gap
from lightning_fp.stability.respond.cure import verify_cure


def gap(mean: float) -> Gap:
    return Gap(count=8, mean=mean, error=0.0005, worst=mean)


@pytest.mark.parametrize(
    ("mean", "error", "verified"),
    [
        (0.001, 0.08, True),
        (-0.03, 0.08, True),  # weights that had adapted: their loss is lower in the old formats
        (0.001, 0.72, False),  # passed by its gap, and ended 2% higher
        (0.006, 0.08, False),
        (math.inf, 0.08, False),
        (math.nan, 0.08, False),
        (0.001, math.inf, False),
        (0.001, math.nan, False),
        (0.001, None, False),
    ],
)
def test_both_measures_are_needed(mean: float, error: float | None, verified: bool) -> None:
    cure = verify_cure(gap(mean), error)
    assert cure.verified == verified
    assert cure.reason.startswith("cured") == verified


def test_what_is_usual_for_the_formats_is_allowed() -> None:
    assert not verify_cure(gap(0.0), 0.35).verified
    assert verify_cure(gap(0.0), 0.35, usual=0.2).verified


def test_the_numbers_are_those_it_rests_on() -> None:
    cure = verify_cure(measure_gap([2.0] * 8, [2.0] * 8), 0.1)
    assert cure.numbers == {
        "gap": 0.0,
        "gap_error": 0.0,
        "gap_worst": 0.0,
        "batches": 8.0,
        "grad_error": 0.1,
    }
