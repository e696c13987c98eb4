"""Strategy x format x {eager, compiled} x {checkpointing} x {watch}: runs, or says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import strategy_matrix
from tests.loop.matrix_ranks import FORMATS, STRATEGIES, Cell, cells
from tests.two_ranks import run_on_two_ranks

FAST = [
    Cell(strategy, compiled, FORMATS[(1 + index + compiled) % len(FORMATS)], not compiled, True)
    for index, strategy in enumerate(STRATEGIES)
    for compiled in (False, True)
]
"""One of each row."""


def run(asked: list[Cell], directory: Path) -> dict[Cell, str]:
    """Why each does not run, "" of those that do.

    Raises:
        AssertionError: for one that neither runs nor is refused at setup.
    """
    run_on_two_ranks("tests.loop.matrix_ranks", directory, asked, timeout=1800)
    files = [directory / f"rank{rank}.pt" for rank in range(2)]
    ranks: list[list[dict[str, Any]]] = [torch.load(file, weights_only=True) for file in files]
    found: dict[Cell, str] = {}
    for cell, one, other in zip(asked, *ranks, strict=True):
        found[cell] = one["refused"]
        assert one["refused"] == other["refused"], cell
        if one["refused"]:
            continue
        assert not one["failed"], cell
        assert one["losses"][-1] == pytest.approx(5.7, abs=0.4), cell
        for name, weight in one["weights"].items():
            assert torch.equal(weight, other["weights"][name]), (cell, name)
    return found


def test_one_cell_of_each_row_runs(tmp_path: Path) -> None:
    assert run(FAST, tmp_path) == dict.fromkeys(FAST, "")


@pytest.mark.slow
def test_every_cell_is_as_the_page_says(tmp_path: Path) -> None:
    found = run(cells(), tmp_path)
    before = strategy_matrix.kept() if strategy_matrix.RESULTS.exists() else {}
    strategy_matrix.keep(found)
    assert found == before, "it was written anew; run `python -m tests.strategy_matrix`"


def test_the_page_has_the_matrix() -> None:
    written = strategy_matrix.PAGE.read_text(encoding="utf-8")
    assert written == strategy_matrix.page(), "run `python -m tests.strategy_matrix`"
    assert set(strategy_matrix.kept()) == set(cells())
