"""A small run's records, made up once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.large_run import write_large_run


@pytest.fixture(scope="session")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 layers, 40 intervals, 640 steps; nobody writes to it."""
    return write_large_run(tmp_path_factory.mktemp("made") / "up", layers=12, intervals=40)
