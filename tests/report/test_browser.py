"""The page in a real browser: it draws, answers, fits a phone, and has a dark mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_fp.callbacks import ClampMonitor, ParityProbe, PrecisionFallback
from lightning_fp.demo.faults import ActivationOutliers, fault_plugin, fault_run
from lightning_fp.report import write_report
from tests.report.browser import chromium, look_at


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a short real run with a fault."""
    chromium()
    run = tmp_path_factory.mktemp("run")
    callbacks = [
        ClampMonitor(2, log_every_n_steps=5, what_if=True, dirpath=run),
        ParityProbe(20, worst=1, dirpath=run),
        PrecisionFallback(every_n_steps=4, dirpath=run),
    ]
    fault = ActivationOutliers("*attention*", bits=24, start=20)
    fault_run(fault, fault_plugin("fp8-delayed"), callbacks, steps=40)
    return write_report([run], run / "report.html")


def test_wide_and_light(page: Path, tmp_path: Path) -> None:
    found = look_at(page, tmp_path, width=1100)
    assert found["console"] == ""
    assert found["errors"] == "0"
    charts = int(found["charts"])
    assert charts == page.read_text().count("data-chart=") >= 6
    assert (int(found["told"]), int(found["keys"])) == (charts, charts)
    assert found["background"] == "rgb(251, 251, 250)"


def test_on_a_phone_in_the_dark(page: Path, tmp_path: Path) -> None:
    found = look_at(page, tmp_path, width=360, dark=True)
    assert (found["console"], found["errors"], found["overflow"]) == ("", "0", "0")
    assert found["told"] == found["charts"] != "0"
    assert found["background"] == "rgb(20, 24, 28)"


def test_runs_compared(made_up: Path, tmp_path: Path) -> None:
    page = write_report([made_up, made_up], tmp_path / "two.html")
    found = look_at(page, tmp_path, width=360)
    assert (found["console"], found["errors"], found["overflow"]) == ("", "0", "0")
    assert found["charts"] == str(page.read_text().count("data-chart="))
