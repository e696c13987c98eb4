"""What an incident looks like, from what was found besides the verdict."""

from __future__ import annotations

import math

import pytest

from lightning_fp.stability.respond.likely_cause import CauseEvidence as Evidence
from lightning_fp.stability.respond.likely_cause import likely_cause


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
        (Evidence(), "look at the data and the learning rate"),
        (Evidence(floor=0.02, rates=[1e-3, 1.0]), "differ by 2.0%"),
        (Evidence(floor=0.0, rates=[1e-3, 1e-3, 3e-2]), "it grew from 0.001 to 0.03"),
        (Evidence(floor=math.nan, rates=[0.0, 1e-3, 3e-2]), "it grew from 0.001 to 0.03"),
        (Evidence(rates=[1e-2, 1e-5, 1e-2]), "it grew from 1e-05 to 0.01"),  # a restart
        (Evidence(rates=[1e-3, 3e-2], high_finite=False), "the learning rate"),
        (Evidence(high_finite=False), "it looks like the data: this batch gives inf or NaN"),
        (Evidence(high_finite=False, older_finite=False), "it looks like the weights"),
        (
            Evidence(older_finite=False, older_loss=math.nan, older_loss_then=2.0),
            "the weights",
        ),
        (
            Evidence(older_loss=2.0, older_loss_then=2.1),
            "it looks like the data: an older batch",
        ),
        (Evidence(older_loss=2.2, older_loss_then=2.1, noise=0.05), "it looks like the data"),
        (Evidence(older_loss=2.3, older_loss_then=2.1, noise=0.05), "from 2.1 to 2.3"),
        (Evidence(older_loss=2.3, older_loss_then=2.1), "the optimization itself"),
        (Evidence(older_loss=2.3), "look at the data and the learning rate"),
    ],
)
def test_each_likely_cause(evidence: Evidence, expected: str) -> None:
    assert expected in likely_cause(evidence)


@pytest.mark.parametrize("rates", [[1e-3] * 9, [1e-3 * 0.9**i for i in range(40)], [0.0, 0.0], []])
def test_a_smooth_schedule_is_not_blamed(rates: list[float]) -> None:
    assert likely_cause(Evidence(rates=rates)) == "look at the data and the learning rate"
