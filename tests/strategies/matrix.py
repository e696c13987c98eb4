"""What came of the cells of the matrix of strategies: run, kept, and printed into the docs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.pages import put
from tests.strategies.cells import COMPILED, FORMATS, IN_PARTS, WORLDS, Cell, of
from tests.strategies.ranks import train
from tests.two_ranks import run_on_ranks

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "strategies.json"
PAGE = ROOT / "docs" / "strategy-matrix.md"
TABLE = "matrix of strategies"
"""The name of its place on the page."""

CELL = tuple(field.name for field in fields(Cell))

Losses = dict[tuple[str, str], list[float]]
"""Of one process, eager, by format and base."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one cell."""

    cell: Cell
    result: str
    """"runs", "refused" at setup, or "fails"."""

    why: str = ""
    """The message of the refusal; what failed."""

    difference: float = 0.0
    """Largest relative difference of a loss to that of one process."""

    rehearsal: str = ""
    """What the fallback can do after it; "passed" for all."""

    def row(self) -> dict[str, Any]:
        """As the results keep it."""
        told = {key: value for key, value in vars(self).items() if key != "cell" and value != ""}
        return {**asdict(self.cell), **told}


def bound(cell: Cell) -> float:
    """How far losses may be from those of one process.

    Not at all where each rank multiplies whole tensors, as all ranks have the same batch. Else sums
    are made in parts, and scaled operands have a scale per shard.
    """
    return 1e-3 if cell.strategy in IN_PARTS else 0.0


def run(world: int, cells: Sequence[Cell], directory: Path, alone: Losses) -> list[Outcome]:
    """Train cells one after the other, in one set of processes.

    Args:
        world: how many processes.
        cells: one or more.
        directory: for what the processes tell.
        alone: what one process has found.

    Raises:
        RuntimeError: if a process ended before it told.
    """
    codes = run_on_ranks(world, "tests.strategies.ranks", directory, cells, timeout=7200)
    if codes != [0] * world:
        raise RuntimeError(f"exit codes {codes}: {(directory / 'log0').read_text()[-4000:]}")
    told: list[list[dict[str, Any]]] = torch.load(directory / "told.pt")
    return [
        outcome(cell, ranks, alone[cell.format, cell.base])
        for cell, ranks in zip(cells, told, strict=True)
    ]


def alone(directory: Path, formats: Iterable[tuple[str, str]] = FORMATS) -> Losses:
    """The losses of one process in each format, eager and unwatched."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            (format, base): train(Cell(strategy="", format=format, base=base), directory)["losses"]
            for format, base in formats
        }
    finally:
        torch.set_num_threads(threads)


def outcome(cell: Cell, ranks: list[dict[str, Any]], alone: list[float]) -> Outcome:
    """Judge what the ranks told of a cell."""
    first = ranks[0]
    if failed := [told["failed"] for told in ranks if "failed" in told]:
        return Outcome(cell=cell, result="fails", why=failed[0])
    if "refused" in first:
        return Outcome(cell=cell, result="refused", why=first["refused"])
    if wrong := _wrong(ranks):
        return Outcome(cell=cell, result="fails", why=wrong)
    pairs = zip(first["losses"], alone, strict=True)
    difference = max(abs(loss - expected) / expected for loss, expected in pairs)
    far = "" if difference <= bound(cell) else f"losses {first['losses']}, alone {alone}"
    return Outcome(
        cell=cell,
        result="fails" if far else "runs",
        why=far,
        difference=difference,
        rehearsal=first["watch"].get("rehearsal", ""),
    )


def _wrong(ranks: list[dict[str, Any]]) -> str:
    """What must not be, however a cell trains."""
    first = ranks[0]
    if any("refused" in told for told in ranks):
        return "refused on some ranks alone"
    if not all(map(math.isfinite, first["losses"])):
        return f"losses are {first['losses']}"
    if any(told["same"] != first["same"] for told in ranks):
        return f"ranks differ: {[told['same'] for told in ranks]}"
    if any(told["watch"] != first["watch"] for told in ranks):
        return f"watches differ: {[told['watch'] for told in ranks]}"
    if first["watch"].get("failed_at") is not None:
        return f"the watch failed at step {first['watch']['failed_at']}"
    if first["watch"].get("rehearsal") == "none":
        return "the fallback has not rehearsed"
    return ""


# --- What is kept of it -------------------------------------------------------------------------


def keep(outcomes: Iterable[Outcome]) -> None:
    """Put what came of some cells into the results, and the table of all into the page."""
    found = {cell_in(row): row for row in kept()}
    found.update({each.cell: each.row() for each in outcomes})
    rows = [found[cell] for strategy in WORLDS for cell in of(strategy) if cell in found]
    RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    put(PAGE, TABLE, table(rows))


def kept() -> list[dict[str, Any]]:
    """The rows of earlier runs, one for each cell."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def cell_in(row: dict[str, Any]) -> Cell:
    """The cell that a row of the results is about."""
    return Cell(**{name: row[name] for name in CELL})


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One table for each way to compile, a line for each format, a column for each strategy."""
    notes: list[str] = []
    lines: list[str] = []
    run = {row["compiled"] for row in rows}
    for compiled, heading in ((key, name) for key, name in COMPILED.items() if key in run):
        lines += [f"| {heading} | {' | '.join(WORLDS)} |", f"|---{'|---' * len(WORLDS)}|"]
        for format, base in FORMATS:
            of_line = [
                row
                for row in rows
                if (row["compiled"], row["format"], row["base"]) == (compiled, format, base)
            ]
            fields = [
                _said([row for row in of_line if row["strategy"] == strategy], notes)
                for strategy in WORLDS
            ]
            lines.append(f"| `{format}`, `{base}` | {' | '.join(fields)} |")
        lines.append("")
    lines += [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(lines).rstrip()


def _said(cells: list[dict[str, Any]], notes: list[str]) -> str:
    """What a field says of its cells: how far losses are apart at most, or why there are none."""
    said: list[str] = []
    if runs := [cell for cell in cells if cell["result"] == "runs"]:
        most = max(cell["difference"] for cell in runs)
        said.append("equal" if most == 0 else f"{most:.1e}")
    for result in ("refused", "fails"):
        for why in dict.fromkeys(cell["why"] for cell in cells if cell["result"] == result):
            if why not in notes:
                notes.append(why)
            said.append(f"{result} ({notes.index(why) + 1})")
    return ", ".join(said) or "–"
