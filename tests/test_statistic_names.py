"""What statistics are called, and their units."""

from __future__ import annotations

import math

import pytest

from lightning_fp.recipes import Gate
from lightning_fp.recipes.evidence import GateVerdict
from lightning_fp.statistic_names import called, measured


@pytest.mark.parametrize(
    ("statistic", "value", "said"),
    [
        ("clamped_mass/max", 0.1573, "largest clamped mass of a layer is 15.7%"),
        ("underflow/mean", 2.1e-6, "mean underflow of the layers is 0.0002%"),
        ("sqnr_db/min", 4.8647, "smallest SQNR of a layer is 4.86 dB"),
        ("headroom_bits/min", -1.0, "smallest headroom of a layer is -1 bits"),
        ("fallbacks", 2.0, "number of fallbacks is 2"),
        ("loss", 2.4567, "loss is 2.457"),
        ("eval_gap", 0.01, "evaluation gap is 1%"),
        ("reward/mean", 0.25, "reward/mean is 0.25"),
        ("clamped_mass/max", math.nan, "largest clamped mass of a layer is nan"),
    ],
)
def test_a_name_and_a_unit(statistic: str, value: float, said: str) -> None:
    assert f"{called(statistic)} is {measured(statistic, value)}" == said


def test_a_gate_has_one_unit() -> None:
    gate = Gate(statistic="clamped_mass/max", below=0.01, window=32, reduce="mean")
    failed = GateVerdict(gate=gate, answer="failed", value=0.1573)
    assert failed.sentence() == (
        "largest clamped mass of a layer is 15.7%, must be below 1% (mean of 32 steps)"
    )
    missing = GateVerdict(gate=gate, answer="no data")
    assert missing.sentence() == (
        "largest clamped mass of a layer was not measured in the last 32 steps"
    )
