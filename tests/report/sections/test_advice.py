"""What the statistics advise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_fp.records import StatisticsWriter
from lightning_fp.report.draw.heatmaps import LIMITS
from lightning_fp.report.read.digest import Digest, read_digest
from lightning_fp.report.sections.advice import (
    advise,
    backend_of,
    delayed_would_do,
    limits_of,
    what_if_table,
)


def digest(run_dir: Path, *rows: dict[str, Any]) -> Digest:
    usual = {"operand": "input", "format": "fp8-delayed", "clamped_mass": 0.0, "nonfinite": 0}
    names = list(dict.fromkeys(name for row in rows for name in (*usual, *row)))
    columns = {name: [{**usual, **row}.get(name) for row in rows] for name in names}
    writer = StatisticsWriter(run_dir)
    writer.append({"step": list(range(1, len(rows) + 1)), **columns})
    writer.flush()
    found = read_digest(run_dir)
    assert found is not None
    return found


def test_what_is_over_a_limit_gets_a_remedy(tmp_path: Path) -> None:
    found = digest(
        tmp_path,
        {"layer": "clamps", "clamped_mass": 0.05, "what_if_dynamic_underflow_fraction": 0.02},
        {"layer": "fine", "clamped_mass": 0.001},
        {"layer": "inf", "nonfinite": 3},
        {"layer": "flushes", "underflow_fraction": 0.4, "operand": "weight"},
    )
    advice = advise(found, LIMITS)
    assert [a.of.layer for a in advice] == ["inf", "clamps", "flushes"]
    assert "fp8-dynamic" in advice[1].do
    assert "2.00% to zero" in advice[1].do


def test_a_layer_that_has_left_its_format_needs_no_change(tmp_path: Path) -> None:
    found = digest(
        tmp_path,
        {"layer": "left", "clamped_mass": 0.5},
        {"layer": "stayed", "clamped_mass": 0.05},
    )
    first, second = advise(found, LIMITS, {"left": "fp8-dynamic", "stayed": "fp8-delayed"})
    assert (first.of.layer, second.of.layer) == ("stayed", "left")
    assert second.do == "nothing: the run has moved it to fp8-dynamic"


def test_evidence_comes_before_the_rule(tmp_path: Path) -> None:
    row = {"underflow_fraction": 0.4, "what_if_rowwise_underflow_fraction": 0.3}
    other = "what_if_other_underflow_fraction"
    found = digest(
        tmp_path,
        {"layer": "helped", **row, other: 0.01},
        {"layer": "not", **row, other: 0.35},
    )
    by_layer = {a.of.layer: a.do for a in advise(found, LIMITS)}
    advised = "'fp8-dynamic[input=e5m2,grad_weight=high]'}: it would have flushed 1.00%"
    assert advised in by_layer["helped"]
    assert "would have" not in by_layer["not"]
    table = what_if_table(found)
    assert table is not None
    assert len(table.rows) == 2


def test_evidence_for_what_cannot_run_is_not_advised(tmp_path: Path) -> None:
    row = {"underflow_fraction": 0.4, "what_if_rowwise_underflow_fraction": 0.01}
    found = digest(tmp_path, {"layer": "a", **row, "what_if_other_underflow_fraction": 0.0})
    (advice,) = advise(found, LIMITS, backend="transformer-engine")
    assert advice.do == "set layers={'a': 'bf16'}"
    weight = {"layer": "a", "operand": "weight", **row, "what_if_other_underflow_fraction": 0.0}
    (advice,) = advise(digest(tmp_path / "weight", weight), LIMITS)
    assert "'fp8-rowwise'}: it would have flushed 1.00%" in advice.do


def test_the_runs_own_backend_counts() -> None:
    assert backend_of({"FP8Precision": {"backend": "native"}, "ClampMonitor": {}}) == "native"
    assert backend_of({"FP8Precision": {"backend": "of a later version"}}) == "auto"
    assert backend_of({}) == "auto"


def test_one_bad_interval_of_many_is_no_reason_to_change(tmp_path: Path) -> None:
    rows = [{"layer": "a", "clamped_mass": 0.05 if i == 7 else 0.0} for i in range(20)]
    assert advise(digest(tmp_path, *rows), LIMITS) == []


def test_dynamic_layers_that_delayed_scaling_would_serve(tmp_path: Path) -> None:
    delayed = "what_if_delayed_clamped_mass"
    found = digest(
        tmp_path,
        {"layer": "a", "format": "fp8-dynamic", delayed: 0.0},
        {"layer": "b", "format": "fp8-dynamic", delayed: 0.2},
    )
    assert delayed_would_do(found).startswith("1 of 2 layers")


def test_the_runs_own_limits_count() -> None:
    settings = {
        "ClampMonitor": {"limits": {"clamped_mass": 0.5, "underflow": None}},
        "PrecisionFallback": {"limit": {"sqnr_db": 12}},
    }
    assert limits_of(settings) == {**LIMITS, "clamped_mass": 0.5, "sqnr_db": 12}
    assert limits_of({}) == LIMITS


def test_a_format_of_a_later_version_gets_no_advice(tmp_path: Path) -> None:
    assert advise(digest(tmp_path, {"layer": "a", "format": "fp9", "nonfinite": 9}), LIMITS) == []
