"""The worst operands: what was over a limit, whether it lasts, and what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning_fp.report.draw.heatmaps import LIMITS
from lightning_fp.report.read.digest import OperandHistory
from lightning_fp.report.read.run_records import RunRecords, read_records
from lightning_fp.report.sections.worst import courses, worst_section


def history(clamped: list[float], formats: str = "fp8-delayed") -> OperandHistory:
    """Eight steps apart; rounding is as usual."""
    steps = [8 * (i + 1) for i in range(len(clamped))]
    return OperandHistory(
        layer="a",
        operand="input",
        steps=steps,
        formats=[formats] * len(steps),
        values={
            "clamped_mass": list(clamped),
            "underflow_fraction": [0.0] * len(steps),
            "sqnr_db": [30.0] * len(steps),
        },
    )


def records_with(made_up: Path, *histories: OperandHistory) -> RunRecords:
    records = read_records(made_up)
    assert records.statistics is not None
    digest = replace(records.statistics, histories=list(histories))
    return replace(records, statistics=digest, events=(), starts=())


def test_what_was_over_and_when() -> None:
    clamped, underflow, sqnr = courses(history([0.0, 0.3, 0.02, 0.0, 0.0, 0.0, 0.0, 0.0]), LIMITS)
    assert (clamped.over, clamped.lasts, clamped.worst) == ((16, 24), False, 0.3)
    assert clamped.worst_beside_limit() == "clamped mass 30% (limit 1%)"
    assert not underflow.over
    assert sqnr.worst_beside_limit() == "SQNR 30 dB (limit 15 dB)"


def test_what_comes_and_goes_lasts() -> None:
    again = history([0.0, 0.3, 0.0, 0.0, 0.0, 0.0, 0.3, 0.0])
    assert courses(again, LIMITS)[0].lasts


def test_it_says_what_to_do(made_up: Path) -> None:
    section = worst_section(records_with(made_up, history([0.0] * 7 + [0.3])))
    assert section.text[0].startswith("1 operand is still over a limit now and then")
    (chart,) = section.charts
    assert chart["look"] == (
        "Over a limit at step 64, in 1 of 8 measurements; at worst clamped mass 30% (limit 1%)."
        " It lasts: raise margin, or set layers={'a': 'fp8-dynamic'}."
    )
    assert [panel["title"] for panel in chart["panels"]] == ["clamped mass", "SQNR"]


def test_what_has_passed_needs_nothing(made_up: Path) -> None:
    section = worst_section(records_with(made_up, history([0.3, 0.2] + [0.0] * 14)))
    assert section.text[0].startswith("All of this has passed")
    assert section.charts[0]["look"].endswith("It passed: nothing to do.")


def test_nothing_is_drawn_where_nothing_was_over(made_up: Path) -> None:
    section = worst_section(records_with(made_up, history([0.0] * 8)))
    assert not section.charts
    assert section.text[0].startswith("Every operand was within its limits at all times.")
