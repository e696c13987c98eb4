"""Statistics of Transformer Engine's debug tools become rows of ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_fp.cli import main
from lightning_fp.records import read_statistics
from lightning_fp.records.te_inspect import InspectRecords

LAYER = "model.layer_1.up"
FORMATS = {LAYER: "fp8-delayed[grad_output=e4m3]", "head": "fp8-dynamic"}


@pytest.fixture
def records(tmp_path: Path) -> InspectRecords:
    return InspectRecords(tmp_path, lambda: FORMATS)


def test_names_and_units_are_ours(records: InspectRecords, tmp_path: Path) -> None:
    for name, value in {
        "activation_underflows%": 12.5,
        "activation_fp8_delayed_scaling_overflows%": 0.5,
        "activation_fp8_current_scaling_underflows%": 25.0,
        "activation_scale_inv_min": 0.25,
        "activation_scale_inv_max": 1.0,
        "activation_min": -8.0,
        "activation_max": 2.0,
        "gradient_underflows%": 50.0,
        "wgrad_underflows%": 99.0,
        "activation_l1_norm": 3.0,
    }.items():
        records.log_scalar(f"{LAYER}_{name}", value, 16)
    records.log_scalar("head_weight_underflows%", 1.0, 16)
    records.close()
    first, second, third = read_statistics(tmp_path).to_pylist()
    assert (first["step"], first["layer"], first["operand"]) == (16, LAYER, "input")
    assert first["format"] == "fp8-delayed[grad_output=e4m3]"
    assert first["underflow_fraction"] == 0.125
    assert first["clamped_fraction"] == pytest.approx(0.005)
    assert first["what_if_dynamic_underflow_fraction"] == 0.25
    assert (first["scale"], first["scale_spread_bits"], first["amax"]) == (1.0, 2.0, 8.0)
    assert (second["operand"], second["underflow_fraction"]) == ("grad_output", 0.5)
    assert second["clamped_fraction"] is None
    assert (third["layer"], third["operand"], third["format"]) == ("head", "weight", "fp8-dynamic")


def test_each_iteration_has_rows_of_its_own(records: InspectRecords, tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        records.log_scalar(f"{LAYER}_weight_underflows%", 10.0 * iteration, iteration)
    records.close()
    rows = read_statistics(tmp_path, columns=["step", "underflow_fraction"]).to_pylist()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [round(row["underflow_fraction"], 3) for row in rows] == [0.1, 0.2, 0.3]


def test_over_the_tool_itself_and_read_by_the_commands(
    records: InspectRecords, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = pytest.importorskip("nvdlfw_inspect.logging", reason="nvdlfw_inspect is not installed")
    records.connect()
    try:
        tool.MetricLogger.log_scalar(f"{LAYER}_activation_underflows%", 30.0, 5)
    finally:
        tool.MetricLogger.enabled_loggers.remove(records)
    records.close()
    assert main(["stats", str(tmp_path)]) == 0
    assert LAYER in capsys.readouterr().out


def test_a_missing_tool_is_named(records: InspectRecords, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.startswith("nvdlfw_inspect")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="pip install nvdlfw-inspect"):
        records.connect()
