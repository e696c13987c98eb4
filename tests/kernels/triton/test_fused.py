"""Fused casts are torch's, bit for bit, where Triton interprets them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_fp.kernels.triton.fused import constants
from lightning_fp.kernels.triton.trial import fuses_on
from lightning_fp.numerics import FORMATS

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("every_16_bit_value", marks=pytest.mark.slow),
        pytest.param("odd_operands", marks=pytest.mark.slow),
        *("ties_of_float32", "shapes_and_statistics", "a_layer"),
    ],
)
def test_interpreted(what: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.kernels.triton.interpreted", what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("same\n")


def test_constants_are_those_of_the_formats() -> None:
    assert constants(FORMATS["e4m3"])["LIMIT"] == 0x43E00000  # 448
    assert constants(FORMATS["e4m3"])["CLAMPED_FROM"] == 0x43E80001  # above 464
    assert constants(FORMATS["e5m2"])["CLAMPED_FROM"] == 0x47700000  # from 61440 on


def test_a_cpu_has_no_use_for_them() -> None:
    import torch

    assert not fuses_on(torch.device("cpu"))
    assert not fuses_on(torch.device("mps"))
