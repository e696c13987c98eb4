"""The report of a run of a size that people have."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_fp.report import write_report
from tests.report.large_run import write_large_run

MEASURE = """
import resource, sys, time
from pathlib import Path
from lightning_fp.report import write_report
began = time.process_time()
write_report([Path(sys.argv[1])], sys.argv[2])
print(time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
"""In a process of its own, because the peak of memory is a process's."""


def measure(run: Path, page: Path) -> tuple[float, float, int]:
    """Seconds of processor time, peak of memory in bytes, size of the page in bytes."""
    command = [sys.executable, "-c", MEASURE, str(run), str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = map(float, done.stdout.split()[-2:])
    return seconds, peak, page.stat().st_size


def test_a_run_of_100_layers(tmp_path: Path) -> None:
    run = write_large_run(tmp_path / "run", layers=100, intervals=200)
    began = time.process_time()
    page = write_report([run], tmp_path / "report.html")
    assert time.process_time() - began < 5
    assert page.stat().st_size < 2e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 4e9


@pytest.mark.slow
def test_a_run_of_1000_layers_and_2000_intervals(tmp_path: Path) -> None:
    run = write_large_run(tmp_path / "run", layers=1000, intervals=2000)
    seconds, peak, size = measure(run, tmp_path / "report.html")
    assert seconds < 20
    assert peak < 1e9
    assert size < 15e6
