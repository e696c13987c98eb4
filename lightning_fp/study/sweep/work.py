"""A worker: claims one cell after the other, trains it, keeps what it came to, until all are done.

Two workers on one table are the same command twice. A worker that ends without a word, killed or
out of memory, leaves a claim behind, which another takes over; a cell that was done is never run
again.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lightning_fp.study.sweep.cell_run import CellRun, RecordsLostError
from lightning_fp.study.sweep.factory import check_weights, weights_key
from lightning_fp.study.sweep.grid import Cell
from lightning_fp.study.sweep.storage.cell_table import CellTable, Entry
from lightning_fp.study.sweep.storage.database import database_errors
from lightning_fp.study.sweep.storage.worker_lock import WorkerLock

_RENEWALS = 4
"""Signs of life in the time of a lease."""

_MOST_FAILURES = 3
"""Cells in a row that may fail to run before the worker gives up."""

_DISK = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS")}
"""What a disk refuses with; another OSError is the run's own."""

_WAIT_SECONDS = 1.0
"""From one look to the next, where all that is left is in others' hands."""


class Spectator(Protocol):
    """Who is told how far the sweep is."""

    def began(self, cell: Cell) -> None:
        """A cell begins."""

    def stepped(self, step: int) -> None:
        """A step of it was made."""

    def ended(self, cell: Cell, result: dict[str, Any], entries: Sequence[Entry]) -> None:
        """It has ended; all cells as they stand."""

    def waits(self, entries: Sequence[Entry]) -> None:
        """All cells that are left are in the hands of other workers."""


@dataclass(frozen=True, kw_only=True)
class SweepWorker:
    """What works on a sweep."""

    table: CellTable
    run: CellRun
    spectator: Spectator

    def work(self) -> list[Entry]:
        """Train until no cell is left.

        Returns:
            All cells.

        Raises:
            ValueError: if the disk is full or the table gone; if several cells in a row cannot run,
                or the factory leaks state between them. What is done is kept.
        """
        known: dict[str, str] = {}
        failures = 0
        with WorkerLock(self.run.directory / "workers") as lock, self._told():
            while True:
                for other in self.table.workers():
                    if lock.is_gone(other):
                        self.table.bury(other)
                with self._claimed(lock.name) as cell:
                    entries = self.table.entries()
                    if cell is None:
                        if not any(entry.state in ("open", "claimed") for entry in entries):
                            return entries
                        self.spectator.waits(entries)
                        time.sleep(_WAIT_SECONDS)
                        continue
                    known |= {weights_key(e.cell): e.result["weights"] for e in _done(entries)}
                    error = self._one(cell, lock.name, known)
                failures = failures + 1 if error else 0
                if failures >= _MOST_FAILURES:
                    raise ValueError(f"{failures} cells in a row could not run, the last: {error}")

    @contextmanager
    def _claimed(self, worker: str) -> Generator[Cell | None, None, None]:
        """A cell, open again if anything but its own run goes wrong."""
        cell = self.table.claim(worker)
        try:
            yield cell
        except BaseException:
            with suppress(*database_errors()):
                self.table.leave(worker)
            raise

    def _one(self, cell: Cell, worker: str, known: dict[str, str]) -> str:
        """Train a cell; why it could not run, else ""."""

        def built(now: str) -> None:
            before = known.setdefault(weights_key(cell), now)
            check_weights(self.run.factory.reference, cell, before, now)

        self.spectator.began(cell)
        try:
            with self._alive(cell, worker):
                result = self.run(cell, self.spectator.stepped, built)
        except Exception as error:
            full = isinstance(error, OSError) and error.errno in _DISK
            if full or isinstance(error, (RecordsLostError, *database_errors())):
                raise
            told = " ".join(f"{type(error).__name__}: {error}".split())
            self.table.fail(cell, worker, told)
            self.spectator.ended(cell, {"error": told}, self.table.entries())
            return told
        self.table.finish(cell, worker, result)
        self.spectator.ended(cell, result, self.table.entries())
        return ""

    @contextmanager
    def _alive(self, cell: Cell, worker: str) -> Generator[None, None, None]:
        """Renew the claim while the cell trains."""
        over = threading.Event()

        def renew() -> None:
            while not over.wait(self.table.lease / _RENEWALS):
                with suppress(*database_errors()):  # the next one may come through
                    self.table.renew(cell, worker)

        thread = threading.Thread(target=renew, name="sweep-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    @contextmanager
    def _told(self) -> Generator[None, None, None]:
        """What the disk or the database refuses, in one line."""
        try:
            yield
        except (OSError, *database_errors()) as error:
            told = " ".join(str(error).split())
            raise ValueError(
                f"cannot write to {_place(self.run.directory, self.table)}: {told}; cells that are"
                " done are kept: free some space, or mend it, and give the same command again"
            ) from error


def _done(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.state == "done"]


def _place(directory: Path, table: CellTable) -> str:
    own = Path(table.database.where).parent == directory
    return str(directory) if own else f"{directory} or {table.database.where}"
