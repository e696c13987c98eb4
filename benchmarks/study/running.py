"""Sweeps of the studies: run as far as the time goes, gone on with by the same command."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.proof.journal import quiet
from benchmarks.study.nets import NETS
from lightning_fp.study.sweep.factory import CellFactory
from lightning_fp.study.sweep.grid import Cell, grid
from lightning_fp.study.sweep.results import read_cells
from lightning_fp.study.sweep.storage.cell_table import Entry
from lightning_fp.study.sweep.sweep import Nobody, Sweep

Row = dict[str, Any]


class OutOfTime(Exception):  # noqa: N818 - no error
    """What is done is kept."""


class Clock(Nobody):
    """Says what has ended, and ends a sweep between two cells when its time is over."""

    def __init__(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds

    def began(self, cell: Cell) -> None:
        if time.monotonic() > self.until:
            raise OutOfTime

    def ended(self, cell: Cell, result: dict[str, Any], entries: Sequence[Entry]) -> None:
        done = sum(entry.state in ("done", "failed") for entry in entries)
        told = result.get("error") or result["final_loss"]
        print(f"{done}/{len(entries)} {cell.id} {told}", flush=True)


def rows(
    net: str,
    directory: Path,
    clock: Clock,
    *,
    formats: Sequence[str],
    lrs: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    axes: Mapping[str, Sequence[Any]] | None = None,
) -> list[Row]:
    """Train what is missing, as long as there is time; what there is of all that was asked for."""
    quiet()
    cells = grid(formats, lrs, seeds, axes or {})
    sweep = Sweep(
        factory=CellFactory(f"benchmarks/study/nets.py:{net}", NETS[net]),
        cells=cells,
        steps=steps,
        directory=directory,
    )
    with suppress(OutOfTime):
        sweep.run(clock)
    wanted = {cell.id for cell in cells}
    return [row for row in read_cells(directory) if row["id"] in wanted and not row["error"]]
