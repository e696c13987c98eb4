"""What is said where there is no record: why, and what to do."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from lightning_fp.cli import main
from lightning_fp.records import (
    FormatChange,
    LossRow,
    LossWriter,
    StageChange,
    StatisticsWriter,
)
from lightning_fp.records.events import EventWriter
from lightning_fp.records.run import LayerInfo, RunInfo, write_run
from lightning_fp.report import read_records, run_cost, terminal_summary, write_report
from lightning_fp.report.sections.every_section import sections
from lightning_fp.report.sections.headline import headline

NEVER = (
    "FP8 was asked for but never on: all 2 layers stayed in high precision in every step; the"
    " rollout ended in stage 'high'."
)
CALLBACKS = ("ClampMonitor", "ParityProbe", "EvaluationGap")


def run(directory: Path, *callbacks: str, low: bool) -> Path:
    """Ten steps of two layers that FP8 was asked for, whose rollout never came to it, or did."""
    layers = tuple(
        LayerInfo(name=name, format="fp8-delayed", kernel="", flops_share=0.5) for name in "ab"
    )
    write_run(directory, RunInfo(step=0, settings={name: {} for name in callbacks}, layers=layers))
    LossWriter(directory).append([LossRow(step=step, loss=3.0) for step in range(1, 11)])
    log = EventWriter(directory)
    log.append(StageChange(step=0, reason="", stage="high", previous=""))
    formats = {name: ("fp8-delayed", "bf16") for name in "ab"}
    log.append(FormatChange(step=0, reason="", formats=formats))
    if low:
        log.append(FormatChange(step=9, reason="", formats={"a": ("bf16", "fp8-delayed")}))
    return directory


def missing(directory: Path) -> dict[str, str]:
    records = read_records(directory)
    return {s.id: s.missing for s in sections(records, run_cost(records)) if s.missing}


def test_nothing_was_there_to_measure(tmp_path: Path) -> None:
    said = missing(run(tmp_path, *CALLBACKS, low=False))
    nothing = "ClampMonitor had nothing to measure: no layer was in low precision in any step."
    assert said["casts"] == said["worst"] == said["advice"] == nothing
    assert said["parity"].startswith("ParityProbe has not probed yet: it writes once per every_n")
    assert said["evaluation"].startswith("EvaluationGap has measured no validation")


def test_the_run_was_too_short(tmp_path: Path) -> None:
    said = missing(run(tmp_path, *CALLBACKS, low=True))
    assert said["casts"] == (
        "ClampMonitor has no rows yet: it writes once per log interval, and the run is recorded up"
        " to step 10."
    )


def test_nobody_asked(tmp_path: Path) -> None:
    said = missing(run(tmp_path, low=True))
    assert said["casts"] == "Not recorded: add ClampMonitor() to the Trainer's callbacks."
    assert "ClampMonitor(what_if=True)" in said["advice"]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    run(tmp_path, *CALLBACKS, low=True)
    StatisticsWriter(tmp_path)
    (tmp_path / "statistics" / "part-000000.parquet").write_bytes(b"no parquet")
    (tmp_path / "statistics" / "part-000001.parquet").write_bytes(b"")
    assert read_records(tmp_path).unreadable == (
        "statistics/part-000000.parquet and 1 more cannot be read, and is left out",
    )
    assert missing(tmp_path)["casts"] == "statistics/ is there and cannot be read: see above."


@pytest.mark.parametrize("low", [False, True])
def test_never_in_low_precision_is_the_headline_in_red(low: bool, tmp_path: Path) -> None:
    directory = run(tmp_path / "run", "ClampMonitor", low=low)
    records = read_records(directory)
    assert headline(records, run_cost(records)).startswith(NEVER) == (not low)
    page = write_report([directory], tmp_path / "r.html").read_text()
    assert ('class="headline alarm"' in page) == (not low)
    compared = write_report([directory, directory], tmp_path / "c.html").read_text()
    assert compared.count('class="alarm"') == (0 if low else 4)
    console = Console(record=True, width=200, force_terminal=True, file=io.StringIO())
    terminal_summary([directory], console)
    assert (f"\x1b[1;31m{NEVER}" in console.export_text(styles=True)) == (not low)


def test_stats_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run(tmp_path, "ClampMonitor", low=False)
    assert main(["stats", str(directory)]) == 2
    assert "no layer was in low precision in any step" in capsys.readouterr().err
