"""The matrix of strategies: formats under each strategy, each in one of the ways to train.

All ways are run by `python -m tests.strategies`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.strategies import matrix
from tests.strategies.cells import FORMATS, WAYS, WORLDS, Cell, cell_of

EAGER = [way for way in WAYS if not way[0]]
"""What compiles takes long, and is left to the whole matrix."""


def some(strategy: str) -> list[Cell]:
    """One format in three, under the next strategy the next ones; each in another way."""
    place = list(WORLDS).index(strategy)
    return [
        cell_of(strategy, format, EAGER[(index // 3 + place) % len(EAGER)])
        for index, format in enumerate(FORMATS)
        if (index + place) % 3 == 0
    ]


def test_every_format_and_every_way_is_among_them() -> None:
    cells = [cell for strategy in WORLDS for cell in some(strategy)]
    assert {(cell.format, cell.base) for cell in cells} == set(FORMATS)
    ways = {(cell.compiled, cell.checkpointing, cell.watched_by) for cell in cells}
    assert ways == set(EAGER)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> matrix.Losses:
    return matrix.alone(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("strategy", WORLDS)
def test_each_format_trains_as_in_one_process(
    strategy: str, alone: matrix.Losses, tmp_path: Path
) -> None:
    outcomes = matrix.run(2, some(strategy), tmp_path, alone)
    assert not [each for each in outcomes if each.result == "fails"]


def test_the_page_has_the_results() -> None:
    assert all(row["result"] != "fails" for row in matrix.kept())
    written = f"<!-- begin {matrix.TABLE} -->\n\n{matrix.table(matrix.kept())}\n<!-- end"
    assert written in matrix.PAGE.read_text(encoding="utf-8"), "python -m tests.strategies"
