"""`lightning-fp stats`."""

from __future__ import annotations

import doctest
import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_fp.cli import main
from lightning_fp.cli.commands import stats
from lightning_fp.cli.commands.stats import sparkline
from lightning_fp.records import StatisticsWriter


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Three layers over 40 intervals; b clamps, c flushes to zero, a loses nothing."""
    writer = StatisticsWriter(tmp_path)
    for step in range(50, 2050, 50):
        writer.append(
            {
                "step": [step] * 4,
                "layer": ["a", "blocks.b", "blocks.c", "a"],
                "operand": ["input", "input", "grad_output", "output"],
                "format": ["fp8-delayed" if step < 1000 else "bf16", *["fp8-delayed"] * 3],
                "amax": [1.0] * 4,
                "headroom_bits": [0.5, -1.0, math.nan, math.nan],
                "nonfinite": [0, 1, 0, 0],
                "clamped_mass": [0.0, 0.1 * step / 2000, 0.0, math.nan],
                "underflow_fraction": [0.0, 0.0, 0.4, math.nan],
                "sqnr_db": [math.inf, 20.0, 10.0, 1.0],
            }
        )
    writer.flush()
    return str(tmp_path)


def output(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["stats", *args]) == 0
    return capsys.readouterr().out


def test_the_worst(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(output(capsys, run, "--json"))["worst"]
    ranked = {by: [entry["layer"] for entry in entries] for by, entries in found.items()}
    assert ranked == {
        "clamped_mass": ["blocks.b"],
        "underflow_fraction": ["blocks.c"],
        "sqnr_db": ["blocks.c", "blocks.b"],
    }
    entry = found["clamped_mass"][0]
    assert entry["clamped_mass"] == pytest.approx(0.1)
    assert (entry["headroom_bits"], entry["nonfinite"]) == (-1, 40)
    assert found["underflow_fraction"][0]["headroom_bits"] is None

    text = output(capsys, run, "--top", "1")
    assert "3 layers in low precision, steps 50 to 2000" in text
    assert "10.00%" in text
    assert "10.0 dB" in text


def test_nothing_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = StatisticsWriter(tmp_path)
    writer.append({"step": [1], "layer": ["a"], "operand": ["input"], "clamped_mass": [0.0]})
    writer.flush()
    assert "No operand has any clamped mass." in output(capsys, str(tmp_path))


def test_a_layers_course(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, run, "--layer", "blocks.*")
    assert text.index("blocks.b") < text.index("blocks.c")
    assert "▁▁▁▂▂▂▂▂" in text
    assert "fp8-delayed -> bf16" in output(capsys, run, "--layer", "a")
    curves: dict[str, Any] = json.loads(output(capsys, run, "--layer", "a", "--json"))["layers"]
    assert len(curves["a"]["input"]["step"]) == 40
    assert curves["a"]["input"]["sqnr_db"][0] is None  # JSON has no infinity


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{run}/nowhere"], "no statistics in"),
        (["{run}", "--layer", "head"], "--layer 'head' matches no layer of the run; it has a, "),
        (["{run}", "--top", "0"], "--top must be at least 1, got 0"),
    ],
)
def test_refusals(
    run: str, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert main(["stats", *(arg.format(run=run) for arg in args)]) == 2
    assert message in capsys.readouterr().err


def test_no_rows_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    StatisticsWriter(tmp_path)
    assert main(["stats", str(tmp_path)]) == 2
    assert "has no rows yet" in capsys.readouterr().err


class TestSparkline:
    def test_long_curves_show_the_worse_end(self) -> None:
        values = [0.0] * 50 + [1.0] + [0.0] * 49
        assert sparkline(values, width=10) == "▁▁▁▁▁█▁▁▁▁"
        assert sparkline([-v for v in values], width=10, of=min) == "█████▁████"

    @pytest.mark.parametrize("values", [[], [None], [math.inf, math.nan], [2.0]])
    def test_little_to_draw(self, values: list[float | None]) -> None:
        assert len(sparkline(values)) == len(values)

    def test_example(self) -> None:
        assert doctest.testmod(stats).failed == 0
