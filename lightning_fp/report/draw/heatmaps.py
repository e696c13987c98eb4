"""Layers by steps: what the casts lost, as pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fp.report.draw.parts import Chart, Table, decibels
from lightning_fp.report.read.digest import Cell, Digest, Ranking
from lightning_fp.statistic_names import share

ROWS = 200
"""Rows of a heatmap at most; of more layers neighbours share one."""

NAMES: dict[Ranking, str] = {
    "clamped_mass": "clamped mass",
    "underflow_fraction": "underflow",
    "sqnr_db": "SQNR",
}

UNITS: dict[Ranking, str] = {"clamped_mass": "%", "underflow_fraction": "%", "sqnr_db": "dB"}

_LOOK: dict[Ranking, str] = {
    "clamped_mass": (
        "How much of an operand's magnitude was cut off because it did not fit the format. Orange"
        " is over the limit. A whole orange row is a scale that does not fit that layer; an orange"
        " column is one moment that hit many layers: look at the loss there."
    ),
    "underflow_fraction": (
        "The share of values that are not zero and became zero. Rows that stay orange lose their"
        " small values all the time: a wider format or finer scales help."
    ),
    "sqnr_db": (
        "Signal over rounding error: FP8 usually keeps 24 to 32 dB. Orange is below the limit: at"
        " 15 dB the error is 18% of the signal, at 0 dB it is as large as the signal."
    ),
}

LIMITS: dict[Ranking, float] = {"clamped_mass": 0.01, "underflow_fraction": 0.25, "sqnr_db": 15.0}
"""From where on a cell is orange: the defaults of LayerLimit and of ClampMonitor's warnings."""


def heatmap(digest: Digest, ranking: Ranking, limit: float) -> Chart:
    """The picture of one statistic.

    Args:
        digest: the run's statistics.
        ranking: which statistic.
        limit: from where on a cell is worth a look.
    """
    prefix = common_prefix(digest.layers)
    layers = [layer.removeprefix(prefix) for layer in digest.layers]
    values, labels = grouped_rows(digest.grids[ranking], layers, lowest=ranking == "sqnr_db")
    return {
        "type": "heatmap",
        "title": f"{NAMES[ranking][0].upper()}{NAMES[ranking][1:]}, worst operand of each layer",
        "look": _LOOK[ranking] + (f" All names begin with {prefix}" if prefix else ""),
        "rows": labels,
        "columns": [list(column) for column in digest.columns],
        "values": base64.b64encode(values.float().contiguous().numpy().tobytes()).decode(),
        "limit": limit,
        "low_is_bad": ranking == "sqnr_db",
        "unit": UNITS[ranking],
        "name": NAMES[ranking],
    }


def common_prefix(names: Sequence[str]) -> str:
    """What all names begin with, in whole parts.

    >>> common_prefix(["model.blocks.0.up", "model.blocks.1.up"])
    'model.blocks.'
    """
    parts = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for same in zip(*parts, strict=False):
        if len(set(same)) > 1:
            break
        shared.append(same[0])
    return "".join(f"{part}." for part in shared) if len(names) > 1 else ""


def grouped_rows(
    grid: Tensor, layers: Sequence[str], *, lowest: bool, most: int = ROWS
) -> tuple[Tensor, list[str]]:
    """Neighbouring layers put together, by their worst.

    Args:
        grid: float32 [layers, columns]; NaN where nothing was measured.
        layers: their names.
        lowest: whether small is bad.
        most: rows to return at most.

    Returns:
        float32 [rows, columns] and a label for each row.
    """
    each = -(-len(layers) // most)
    if each <= 1:
        return grid, list(layers)
    empty = torch.inf if lowest else -torch.inf
    filled = torch.nan_to_num(grid, nan=empty, posinf=torch.inf, neginf=-torch.inf)
    missing = -len(layers) % each
    filled = torch.cat([filled, torch.full((missing, grid.shape[1]), empty)])
    parts = filled.view(-1, each, grid.shape[1])
    worst = parts.amin(1) if lowest else parts.amax(1)
    ends = [(i, min(i + each, len(layers)) - 1) for i in range(0, len(layers), each)]
    labels = [layers[a] if a == b else f"{layers[a]} to {layers[b]}" for a, b in ends]
    return worst.masked_fill(worst.isinf(), torch.nan), labels


def worst_cells(cells: Sequence[Cell], ranking: Ranking) -> Table:
    """The exact worst values behind a picture.

    Args:
        cells: the worst first.
        ranking: the statistic they are ranked by.
    """
    shown = decibels if ranking == "sqnr_db" else share
    columns = ("layer", "operand", "format", "step", NAMES[ranking])
    if not cells:
        name = NAMES[ranking]
        measured = "was measured" if ranking == "sqnr_db" else "anywhere"
        nothing = f"No {name} {measured}."
        return Table(title="", columns=columns, rows=(), note=nothing)
    worst = cells[0]
    return Table(
        title=f"Worst: {shown(worst.value)}, {worst.layer}, {worst.operand}, step {worst.step:,}",
        columns=columns,
        rows=[
            [cell.layer, cell.operand, cell.format, f"{cell.step:,}", shown(cell.value)]
            for cell in cells
        ],
        numbers=frozenset({3, 4}),
        folded=True,
    )
