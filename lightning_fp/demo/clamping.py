"""What the clamp log of a run says, in one line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fp.records import read_statistics
from lightning_fp.terminal import FittedTable


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The worst value of each statistic over a run, with the operand it belongs to."""

    scaling: str
    clamped_mass: tuple[float, str]
    headroom_bits: tuple[float, str]
    underflow_fraction: tuple[float, str]
    sqnr_db: tuple[float, str]


def worst_of(scaling: str, directory: Path) -> Worst:
    """Read a run's clamp log.

    Args:
        scaling: the run's format; rows of other formats are left out.
        directory: where ClampMonitor wrote.
    """
    rows: list[dict[str, Any]] = read_statistics(directory).to_pylist()
    rows = [row for row in rows if row["format"] == scaling and row["operand"] != "output"]

    def worst(name: str, *, largest: bool) -> tuple[float, str]:
        known = [
            (float(row[name]), f"{row['layer']} {row['operand']}")
            for row in rows
            if row[name] is not None and math.isfinite(row[name])
        ]
        return (max if largest else min)(known, default=(math.nan, ""))

    return Worst(
        scaling=scaling,
        clamped_mass=worst("clamped_mass", largest=True),
        headroom_bits=worst("headroom_bits", largest=False),
        underflow_fraction=worst("underflow_fraction", largest=True),
        sqnr_db=worst("sqnr_db", largest=False),
    )


def clamp_table(runs: tuple[Worst, ...]) -> FittedTable:
    """The runs' worst operands, side by side."""
    title = "What the casts did: the worst operand of each run"
    table = FittedTable(title, "", *(run.scaling for run in runs))
    for name, form, cells in (
        ("clamped mass", "{:.3%}", [run.clamped_mass for run in runs]),
        ("headroom", "{:+.2f} bits", [run.headroom_bits for run in runs]),
        ("underflow", "{:.1%}", [run.underflow_fraction for run in runs]),
        ("SQNR", "{:.1f} dB", [run.sqnr_db for run in runs]),
    ):
        table.add_row(
            name, *(f"{form.format(value)}\n[dim]{whose}[/dim]" for value, whose in cells)
        )
    return table
