"""cells.parquet: a row for each cell that has run."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_fp.study.sweep.grid import shown
from lightning_fp.study.sweep.storage.cell_table import Entry

FILE = "cells.parquet"

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("format", pa.string()),
        ("lr", pa.float64()),
        ("seed", pa.int64()),
        ("setting", pa.string()),  # the further axes in words
        ("diverged", pa.bool_()),
        ("diverged_step", pa.int64()),
        ("why", pa.string()),
        ("first_loss", pa.float64()),
        ("final_loss", pa.float64()),  # mean of the last tenth of the steps; null if not finite
        ("best_loss", pa.float64()),
        ("spikes", pa.int64()),
        ("nonfinite_steps", pa.int64()),
        ("steps", pa.int64()),
        ("seconds", pa.float64()),
        ("cpu_seconds", pa.float64()),
        ("skipped", pa.int64()),
        ("rolled_back", pa.int64()),
        ("replayed", pa.int64()),
        ("kept", pa.float64()),  # share of the layers' steps in the format asked for
        ("weights", pa.string()),
        ("curve", pa.list_(pa.float64())),
        ("error", pa.string()),
    ]
)
"""Columns; each further axis has one more, of text, named as the axis."""


def write_cells(directory: Path, entries: Sequence[Entry]) -> Path:
    """Write the table of the cells that are done or failed; whole, or not at all.

    Args:
        directory: of the sweep.
        entries: all cells.

    Returns:
        The file.
    """
    ran = [entry for entry in entries if entry.state in ("done", "failed")]
    axes = {name for entry in entries for name in entry.cell.axes}
    # A name of ours that an axis has too is ours.
    further = [name for name in sorted(axes) if name not in SCHEMA.names]
    schema = pa.schema([*SCHEMA, *((name, pa.string()) for name in further)])
    path = directory / FILE
    passing = path.with_name(f".{FILE}.{uuid.uuid4().hex[:8]}")
    try:
        table = pa.Table.from_pylist([_row(entry, further) for entry in ran], schema=schema)
        pq.write_table(table, passing)
        os.replace(passing, path)
    finally:
        passing.unlink(missing_ok=True)
    return path


def read_cells(path: str | Path) -> list[dict[str, Any]]:
    """The rows of `cells.parquet`.

    Args:
        path: the file, or the directory of a sweep.

    Raises:
        ValueError: if there is no such file.
    """
    place = Path(path)
    place = place / FILE if place.is_dir() else place
    if not place.is_file():
        raise ValueError(f"there is no {place}; `lightning-fp study sweep` writes it")
    return pq.read_table(place).to_pylist()


def _row(entry: Entry, further: Sequence[str]) -> Mapping[str, Any]:
    cell, result = entry.cell, entry.result
    own = {
        "id": cell.id,
        "format": cell.format,
        "lr": cell.lr,
        "seed": cell.seed,
        "setting": cell.setting,
    }
    axes = {name: shown(cell.axes[name]) for name in further if name in cell.axes}
    return {**{name: result.get(name) for name in SCHEMA.names}, **own, **axes}
