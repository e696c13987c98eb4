"""Sweep: the whole of it, from what is asked for to the files with what was found."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_fp import __version__
from lightning_fp.choices import check_at_least
from lightning_fp.study.sweep.cell_run import CellRun
from lightning_fp.study.sweep.factory import CellFactory
from lightning_fp.study.sweep.findings import Findings, find
from lightning_fp.study.sweep.formats import check_formats
from lightning_fp.study.sweep.grid import Cell
from lightning_fp.study.sweep.own_axes import check_own_axes
from lightning_fp.study.sweep.page import write_page
from lightning_fp.study.sweep.results import read_cells, write_cells
from lightning_fp.study.sweep.storage.cell_table import CellTable, Entry
from lightning_fp.study.sweep.storage.database import database_errors, open_database
from lightning_fp.study.sweep.work import Spectator, SweepWorker
from lightning_fp.study.total_cost import total_costs


class Nobody:
    """Watches a sweep and says nothing."""

    def began(self, cell: Cell) -> None:
        """Nothing."""

    def stepped(self, step: int) -> None:
        """Nothing."""

    def ended(self, cell: Cell, result: dict[str, Any], entries: Sequence[Entry]) -> None:
        """Nothing."""

    def waits(self, entries: Sequence[Entry]) -> None:
        """Nothing."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Cells to be trained, and where.

    Calling `run` again, here or in another process, goes on where it was stopped.
    """

    factory: CellFactory
    cells: Sequence[Cell]
    """See `grid`."""

    steps: int
    """Optimizer steps of each run."""

    directory: Path

    storage: str | None = None
    """URL of the database that the table of cells is in; None is a file in the directory."""

    threads: int = 1
    """Of torch. Another number may add in another order, so all workers have the same."""

    def __post_init__(self) -> None:
        if not self.cells:
            raise ValueError("cells must be at least one, got none")
        check_at_least(1, threads=self.threads)
        check_at_least(10, steps=self.steps)

    def run(self, spectator: Spectator | None = None) -> Findings:
        """Train what is left, and write cells.parquet and sweep.html.

        Args:
            spectator: who is told how far it is.

        Returns:
            What all cells say.

        Raises:
            ValueError: for a format that does not run, a factory that is none or leaks state, a
                directory with another sweep, a full disk. What is done is kept.
        """
        torch.set_num_threads(self.threads)
        before = logging.root.manager.disable
        try:
            logging.disable(logging.WARNING)  # of hundreds of runs
            axes = list(self.cells[0].axes)
            check_formats({cell.format for cell in self.cells})
            self.factory.check_axes(axes)
            check_own_axes(self.cells)
            self.factory.check_state(self.cells, self.steps, self.directory)
            table = self._table(axes)
            run = CellRun(factory=self.factory, steps=self.steps, directory=self.directory)
            worker = SweepWorker(table=table, run=run, spectator=spectator or Nobody())
            try:
                worker.work()
            except BaseException:
                with suppress(Exception):  # what there is can be read, however it ended
                    self._write(table)
                raise
        finally:
            logging.disable(before)
        try:
            return self._write(table)
        except (OSError, *database_errors()) as error:
            raise ValueError(
                f"cannot write to {self.directory}: {_line(error)}; all cells are kept: give the"
                " same command again"
            ) from error

    def _table(self, axes: Sequence[str]) -> CellTable:
        settings = {
            "factory": self.factory.reference,
            "steps": self.steps,
            "axes": sorted(axes),
            "threads": self.threads,
        }
        where = self.storage or self.directory
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            table = CellTable(open_database(self.storage, self.directory))
            table.enqueue(self.cells, settings, {"version": __version__})
        except ImportError as error:
            raise ValueError(str(error)) from error
        except (OSError, *database_errors()) as error:
            raise ValueError(f"the sweep cannot be kept in {where}: {_line(error)}") from error
        return table

    def _write(self, table: CellTable) -> Findings:
        write_cells(self.directory, table.entries())
        rows = read_cells(self.directory)
        findings = find(rows, self.steps)
        write_page(self.directory, findings, total_costs(rows, findings))
        return findings


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
