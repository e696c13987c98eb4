"""How far a sweep is: a bar on a terminal, a line for each cell elsewhere."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_fp.report.draw.parts import duration
from lightning_fp.study.sweep.grid import Cell
from lightning_fp.study.sweep.results import write_cells
from lightning_fp.study.sweep.storage.cell_table import Entry
from lightning_fp.study.sweep.work import Spectator

_TABLE_SECONDS = 10.0
"""The table of results is written anew at most so often while cells go on."""


def time_left(entries: Sequence[Entry], workers: int) -> float | None:
    """Seconds until all cells are done, by what cells of their format have taken; None if unknown.

    Args:
        entries: all cells.
        workers: how many work on them.
    """
    took: dict[str, list[float]] = {}
    for entry in entries:
        if entry.state == "done":
            took.setdefault(entry.cell.format, []).append(float(entry.result["seconds"]))
    known = [seconds for times in took.values() for seconds in times]
    if not known:
        return None
    usual = sum(known) / len(known)
    left = [entry.cell.format for entry in entries if entry.state in ("open", "claimed")]
    expected = (sum(took[f]) / len(took[f]) if f in took else usual for f in left)
    return sum(expected) / max(1, workers)


@contextmanager
def progress(
    screen: Console, cells: int, steps: int, directory: Path
) -> Generator[Spectator, None, None]:
    """Show how a sweep goes on.

    Args:
        screen: where.
        cells: how many there are.
        steps: of each.
        directory: of the sweep, where the table of results is kept up to date.
    """
    if not screen.is_terminal:
        yield _Lines(screen, directory)
        return
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[done]}/{task.fields[cells]} cells"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=screen,
        transient=True,
    )
    with bar:
        task = bar.add_task("sweep", total=cells * steps, done=0, cells=cells, left="")
        yield _Bar(bar, task, steps, directory)


class _Lines:
    """A line for each cell that has ended."""

    def __init__(self, screen: Console, directory: Path) -> None:
        self._screen, self._directory = screen, directory
        self._written = 0.0
        self._waited_for: set[str] = set()

    def began(self, cell: Cell) -> None:
        """Nothing yet."""

    def stepped(self, step: int) -> None:
        """Nothing yet."""

    def waits(self, entries: Sequence[Entry]) -> None:
        """Say for whom, once: of a worker on a machine that went down, a lease has to run out."""
        held = _holders(entries)
        if held - self._waited_for:
            text = f"waiting for {', '.join(sorted(held))}, at the last cells"
            self._screen.print(text, markup=False, soft_wrap=True)
        self._waited_for |= held

    def ended(self, cell: Cell, result: dict[str, Any], entries: Sequence[Entry]) -> None:
        """Say what came of it, and how long the others may take."""
        left = time_left(entries, _workers(entries))
        text = f"{_done(entries)}/{len(entries)} {cell.id}: {outcome(result)}"
        if left:
            text += f"; {duration(left)} left"
        self._screen.print(text, markup=False, soft_wrap=True)
        self._keep(entries)

    def _keep(self, entries: Sequence[Entry]) -> None:
        if time.monotonic() - self._written > _TABLE_SECONDS:
            write_cells(self._directory, entries)
            self._written = time.monotonic()


class _Bar(_Lines):
    """A bar over the steps of all cells."""

    def __init__(self, bar: Progress, task: Any, steps: int, directory: Path) -> None:
        super().__init__(bar.console, directory)
        self._bar, self._task, self._steps = bar, task, steps
        self._before = 0

    def began(self, cell: Cell) -> None:
        """Name it."""
        self._bar.update(self._task, description=cell.id)

    def stepped(self, step: int) -> None:
        """Move on."""
        self._bar.update(self._task, completed=self._before + step)

    def waits(self, entries: Sequence[Entry]) -> None:
        """Say for whom."""
        self._show(f"waiting for {', '.join(sorted(_holders(entries)))}", entries)

    def ended(self, cell: Cell, result: dict[str, Any], entries: Sequence[Entry]) -> None:
        """Count it, and what others have done meanwhile."""
        self._show(cell.id, entries)
        self._keep(entries)

    def _show(self, what: str, entries: Sequence[Entry]) -> None:
        done = _done(entries)
        left = time_left(entries, _workers(entries))
        self._before = done * self._steps
        self._bar.update(
            self._task,
            description=what,
            completed=self._before,
            total=len(entries) * self._steps,
            done=done,
            cells=len(entries),
            left="" if left is None else f"{duration(left)} left",
        )


def outcome(result: dict[str, Any]) -> str:
    """What a cell came to, in a few words."""
    if "error" in result:
        return f"could not run: {result['error']}"
    if result["diverged"]:
        return f"diverged at step {result['diverged_step']}, {result['why']}"
    return f"final loss {result['final_loss']:.4g}"


def _done(entries: Sequence[Entry]) -> int:
    return sum(entry.state in ("done", "failed") for entry in entries)


def _workers(entries: Sequence[Entry]) -> int:
    # This one has just put its cell down.
    return 1 + len(_holders(entries))


def _holders(entries: Sequence[Entry]) -> set[str]:
    return {entry.worker or "" for entry in entries if entry.state == "claimed"}
