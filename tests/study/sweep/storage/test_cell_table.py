"""The table of cells, in SQLite and, where it is installed, through SQLAlchemy."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path

import pytest

from lightning_fp.study.sweep.grid import Cell, grid
from lightning_fp.study.sweep.storage.cell_table import MOST_TRIES, CellTable
from lightning_fp.study.sweep.storage.database import Other, SQLite, open_database

CELLS = grid(["bf16", "e8m3"], [1e-3, 1e-2], range(3), {})
ALCHEMY = importlib.util.find_spec("sqlalchemy") is not None


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param(
            "sqlalchemy", marks=pytest.mark.skipif(not ALCHEMY, reason="needs SQLAlchemy")
        ),
    ]
)
def database(request: pytest.FixtureRequest, tmp_path: Path):
    if request.param == "sqlite":
        return SQLite(tmp_path / "cells.sqlite")
    return Other(f"sqlite+pysqlite:///{tmp_path / 'cells.sqlite'}")


def table(database, lease: float = 60.0) -> CellTable:
    made = CellTable(database, lease=lease)
    made.enqueue(CELLS, {"steps": 10}, {})
    return made


def test_cells_are_dealt_out_once_in_order_and_kept(database) -> None:
    cells = table(database)
    claimed: list[Cell] = []
    while (cell := cells.claim("me")) is not None:
        claimed.append(cell)
        assert cells.finish(cell, "me", {"final_loss": 1.5})
    assert claimed == CELLS
    table(database)  # the same command again
    assert cells.claim("me") is None
    assert [entry.result for entry in cells.entries()] == [{"final_loss": 1.5}] * len(CELLS)


def test_workers_at_once_share_the_cells(database) -> None:
    claimed: dict[str, list[str]] = {}

    def work(name: str) -> None:
        own = CellTable(database)
        own.enqueue(CELLS, {"steps": 10}, {})
        mine = claimed.setdefault(name, [])
        while (cell := own.claim(name)) is not None:
            mine.append(cell.id)
            own.finish(cell, name, {})

    threads = [threading.Thread(target=work, args=(f"worker {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dealt = [id for mine in claimed.values() for id in mine]
    assert sorted(dealt) == sorted(cell.id for cell in CELLS)


def test_a_claim_is_taken_over_when_its_lease_is_over_and_not_before(database) -> None:
    cells = table(database, lease=60.0)
    first = cells.claim("slow")
    assert first == CELLS[0]
    for cell in CELLS[1:]:
        assert cells.claim("other") == cell
    assert cells.claim("other") is None
    lapsed = CellTable(database, lease=-1.0)
    assert lapsed.renew(first, "slow")  # to a time that is past
    assert cells.claim("other") == first
    assert not cells.finish(first, "slow", {"final_loss": 1.0}), "it is another's by now"
    assert not cells.renew(first, "slow")
    assert cells.finish(first, "other", {"final_loss": 2.0})
    assert not cells.finish(first, "other", {"final_loss": 3.0}), "a result is kept once"
    assert cells.entries()[0].result == {"final_loss": 2.0}


def test_cells_of_a_worker_that_is_gone_are_open_at_once(database) -> None:
    cells = table(database)
    first = cells.claim("gone")
    assert cells.workers() == {"gone"}
    assert cells.bury("gone") == 1
    claimed = [cells.claim("me") for _ in CELLS]
    assert claimed == [*CELLS[1:], first]


def test_a_cell_that_kills_its_workers_is_given_up(database) -> None:
    cells = table(database)
    dealt: list[Cell] = []
    while (cell := cells.claim("me")) is not None:
        dealt.append(cell)
        if cell == CELLS[0]:
            cells.bury("me")
        else:
            cells.finish(cell, "me", {})
    assert dealt == [*CELLS, *[CELLS[0]] * (MOST_TRIES - 1)], "it keeps no other waiting"
    first, *others = cells.entries()
    assert first.state == "failed"
    assert "killed" in first.result["error"]
    assert {entry.state for entry in others} == {"done"}
    table(database)  # the next command tries again
    assert cells.claim("me") == CELLS[0]


def test_a_sweep_that_is_killed_again_and_again_gives_up_no_cell(database) -> None:
    for _ in range(2 * MOST_TRIES):
        cells = table(database)  # the same command
        while (cell := cells.claim("me")) not in (None, CELLS[0]):
            cells.finish(cell, "me", {})
        assert cell == CELLS[0]
        cells.bury("me")
    assert cells.entries()[0].state == "open"


def test_what_a_worker_leaves_has_not_been_tried(database) -> None:
    cells = table(database)
    for _ in range(2 * MOST_TRIES):
        assert cells.claim("me") == CELLS[0]
        cells.leave("me")


def test_other_settings_are_refused_and_add_nothing(database) -> None:
    cells = table(database)
    further = grid(["fp16"], [1e-3], [0], {})
    with pytest.raises(ValueError, match="steps 10, not 20"):
        cells.enqueue(further, {"steps": 20}, {})
    assert len(cells.entries()) == len(CELLS)
    cells.enqueue(further, {"steps": 10}, {})
    assert len(cells.entries()) == len(CELLS) + 1


def test_urls(tmp_path: Path) -> None:
    assert isinstance(open_database(None, tmp_path), SQLite)
    assert isinstance(open_database(f"sqlite:///{tmp_path}/x.sqlite", tmp_path), SQLite)


@pytest.mark.skipif(not ALCHEMY, reason="needs SQLAlchemy")
@pytest.mark.parametrize("url", ["nonsense", "nosuchdb://host/name"])
def test_urls_that_are_none(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--storage"):
        open_database(url, tmp_path)


@pytest.mark.skipif(ALCHEMY, reason="where SQLAlchemy is not installed")
def test_the_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"lightning-fp\[storage\]"):
        open_database("postgresql://host/name", tmp_path)
