"""A few scalars for loggers: the same names at every step, so that no curve breaks."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from lightning_fp.layers import LinearFormat
from lightning_fp.layers.table_owner import TableOwner
from lightning_fp.records import StatisticsRows
from lightning_fp.records.rows import CAST
from lightning_fp.records.tables import SCHEMA

LOSSLESS_DB = 150.0
"""What loggers get for an SQNR of infinity: float32 cannot be told from exact above."""

PER_LAYER = (
    "amax",
    "headroom_bits",
    "nonfinite",
    "clamped_fraction",
    "clamped_mass",
    "underflow_fraction",
    "sqnr_db",
)

SUMMARIES = {
    "fp8/clamped_mass/max": "clamped_mass/max",
    "fp8/clamped_mass/mean": "clamped_mass/mean",
    "fp8/underflow/max": "underflow_fraction/max",
    "fp8/underflow/mean": "underflow_fraction/mean",
    "fp8/sqnr_db/min": "sqnr_db/min",
    "fp8/headroom_bits/min": "headroom_bits/min",
}
"""What `summary` makes of an interval, and of which of `COLUMNS`."""

_REDUCE: Mapping[str, Any] = {"max": torch.amax, "min": torch.amin, "mean": torch.mean}

# The first four say what a row is: step, layer, operand, format.
COLUMNS = tuple(f"{name}/{how}" for name in SCHEMA.names[4:] for how in _REDUCE)
"""What `of_column` can make of an interval: any column of the rows, over all operands."""


def summary(rows: StatisticsRows) -> dict[str, float]:
    """Extremes and means over all operands in low precision; NaN where nothing was measured.

    Args:
        rows: one interval's rows.
    """
    values = {name: of_column(rows, column) for name, column in SUMMARIES.items()}
    return {name: min(value, LOSSLESS_DB) for name, value in values.items()}  # NaN stays


def of_column(rows: StatisticsRows, name: str) -> float:
    """One of `COLUMNS`, over all operands in low precision; NaN where nothing was measured.

    Args:
        rows: one interval's rows.
        name: a column with "/max", "/min" or "/mean".
    """
    column, _, how = name.rpartition("/")
    if column not in rows.values:
        return math.nan
    values = rows.values[column][rows.low_precision].double()
    known = values[~torch.isnan(values)]
    return float(_REDUCE[how](known)) if len(known) else math.nan


def why_nothing(name: str, formats: Collection[LinearFormat]) -> str:
    """Why `summary` and `of_column` will never have a value; "" where they will.

    Args:
        name: one of `SUMMARIES` or `COLUMNS`.
        formats: those that the layers are in.
    """
    low = [format for format in formats if not format.is_high_precision]
    if not low:
        return "all layers are in high precision"
    per_tensor = [format for format in low if format.is_fp8 and format.granularity == "tensor"]
    if name.startswith("what_if_delayed_") and not per_tensor:
        return "no layer is in an FP8 format with one scale per tensor"
    if name.startswith("scale_spread_bits") and all(f.granularity == "tensor" for f in low):
        return "every layer has one scale per tensor"
    return ""


def per_layer(rows: StatisticsRows, names: Sequence[str]) -> dict[str, float]:
    """`fp8/<layer>/<operand>/<statistic>` for these layers, whether they were seen or not.

    Args:
        rows: one interval's rows.
        names: the layers.
    """
    row = {key: i for i, key in enumerate(zip(rows.layers, rows.operands, strict=True))}
    scalars: dict[str, float] = {}
    for layer in names:
        for operand in CAST:
            index = row.get((layer, operand))
            for name in PER_LAYER:
                value = math.nan if index is None else float(rows.values[name][index])
                scalars[f"fp8/{layer}/{operand}/{name}"] = (
                    min(value, LOSSLESS_DB) if name == "sqnr_db" else value
                )
    return scalars


def flops_share(owner: TableOwner, changes: Mapping[str, LinearFormat] | None = None) -> float:
    """Share of the model's FLOPs that are in low precision, 0 to 1.

    Args:
        owner: of the table.
        changes: formats to come, by layer; the others keep theirs.
    """
    now = {name: layer.format for name, layer in owner.precision_map.layers.items()}
    formats = {**now, **(changes or {})}
    low = {name for name, format in formats.items() if not format.is_high_precision}
    if owner.report is None:
        return math.nan
    return sum(layer.flops_share for layer in owner.report.layers if layer.name in low)
