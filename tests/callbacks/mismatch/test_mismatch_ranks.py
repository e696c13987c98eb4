"""Two ranks measure what one pass over both would, and decide alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fp.metrics import TrainingInferenceMismatch
from lightning_fp.records import read_events, read_mismatch
from tests.callbacks.mismatch.mismatch_ranks import SILENT, START, STEPS
from tests.two_ranks import run_on_two_ranks


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mismatch")
    run_on_two_ranks("tests.callbacks.mismatch.mismatch_ranks", directory)
    return directory


def ranks_of(directory: Path, run: str) -> list[dict[str, Any]]:
    return [torch.load(directory / f"rank{rank}.pt")[run] for rank in range(2)]


def test_rows_are_those_of_one_pass(directory: Path) -> None:
    first, second = ranks_of(directory, "growing")
    rows = read_mismatch(directory / "growing").to_pylist()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for step in (0, SILENT, STEPS - 1):
        metric = TrainingInferenceMismatch()
        metric.update(*first["given"][step])
        if step != SILENT:
            metric.update(*second["given"][step - (step > SILENT)])
        for name, value in metric.compute().items():
            assert rows[step][name] == pytest.approx(value.item(), rel=1e-12), name


def test_ranks_decide_alike(directory: Path) -> None:
    """The drift is on one rank; both raise the precision at the same step."""
    first, second = ranks_of(directory, "growing")
    assert first["latest"] == second["latest"]
    assert first["state"] == second["state"]
    assert first["formats"] == second["formats"] == {"layer": "bf16"}
    (event,) = read_events(directory / "growing", kinds=["suspect"])
    assert START < event.step < START + 16


def test_a_rank_that_fails_takes_the_others_along(directory: Path) -> None:
    assert [rank["steps"] for rank in ranks_of(directory, "broken")] == [6, 6]
    assert read_mismatch(directory / "broken")["step"].to_pylist() == [1, 2, 3]
