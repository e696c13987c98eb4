"""`lightning-fp report`."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from lightning_fp.cli import main
from lightning_fp.records import LossRow, LossWriter
from lightning_fp.report.draw import heatmaps, parts, sparkline
from lightning_fp.report.read import run_records
from tests.report.large_run import write_large_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_large_run(tmp_path / "logs" / "version_0", layers=4, intervals=10)


def test_page_and_summary(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    page = run / "report.html"
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"report: {page}"
    assert "156 kept" in printed
    assert "record one with `lightning-fp baseline`" in printed
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_baseline_and_several_runs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = tmp_path / "baseline"
    LossWriter(baseline).append([LossRow(step=s, loss=2.0, seconds=0.2) for s in range(1, 50)])
    page = tmp_path / "new" / "page.html"
    arguments = ["--output", str(page), "--baseline", str(baseline)]
    assert main(["report", str(run), str(baseline), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "1.95x" in printed  # 156 of 160 steps, in half the time
    assert "against the first run" in printed
    assert "2 runs compared" in page.read_text(encoding="utf-8")


def test_refusals(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "run must be a directory" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)  # as if not installed
    assert main(["report", str(run)]) == 2
    captured = capsys.readouterr()
    assert "pip install jinja2" in captured.err
    assert "kept" in captured.out  # the summary needs none


@pytest.mark.parametrize("module", [heatmaps, parts, run_records, sparkline])
def test_examples(module: object) -> None:
    found = doctest.testmod(module)  # pyright: ignore[reportArgumentType]
    assert found.attempted > 0
    assert found.failed == 0
