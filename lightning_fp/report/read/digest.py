"""A run's statistics in little: grids, totals and the worst operands, whatever the table's size.

The table is read a million rows at a time. What is kept grows with the number of layers, not with
the length of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.compute as functions
import torch
from torch import Tensor

from lightning_fp.records import read_statistics

Ranking: TypeAlias = Literal["clamped_mass", "underflow_fraction", "sqnr_db"]

RANKINGS: tuple[Ranking, ...] = ("clamped_mass", "underflow_fraction", "sqnr_db")
"""What operands are ranked by; of the last, small is bad."""

WHAT_IF = (
    "what_if_delayed_clamped_mass",
    "what_if_delayed_underflow_fraction",
    "what_if_dynamic_underflow_fraction",
    "what_if_rowwise_underflow_fraction",
    "what_if_other_underflow_fraction",
)

COLUMNS = 400
"""Columns of a grid at most: a screen's width."""

_CHUNK_ROWS = 2**19
_MOST_DB = 150.0
"""Where nothing is lost the SQNR is infinite; shown as this, as in the loggers."""

_SHOWN = 8
"""Worst operands to keep for each ranking."""

# pyarrow makes its functions at import, out of sight of type checkers.
pc: Any = functions


@dataclass(frozen=True, kw_only=True)
class Totals:
    """One operand of one layer in one format, over the run; None: never measured."""

    layer: str
    operand: str
    format: str
    intervals: int
    """Rows behind this."""
    nonfinite: int
    worst: dict[str, float | None]
    """By ranking: the worst value of any interval."""
    mean: dict[str, float | None]
    """By ranking and what-if column: the mean over intervals."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """An exact value of the table."""

    layer: str
    operand: str
    format: str
    step: int
    value: float


@dataclass(frozen=True, kw_only=True, eq=False)
class OperandHistory:
    """One operand over the steps."""

    layer: str
    operand: str
    steps: list[int]

    formats: list[str]
    """Of every row, in order; two where the format changed within an interval."""

    values: dict[str, list[float | None]]
    """By ranking."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Digest:
    """The statistics of a run."""

    layers: tuple[str, ...]
    """In the order in which the table has them first; see `in_order`."""

    columns: tuple[tuple[int, int], ...]
    """First and last step of each column of the grids."""

    intervals: int
    """Log intervals in the table."""

    rows: int
    """Rows in the table."""

    sampled_at: Tensor
    """int64: the steps that were sampled, ascending; none where the table does not tell."""

    grids: dict[Ranking, Tensor]
    """float32 [layers, columns]: the worst of each layer's operands in a column's intervals; NaN
    where nothing was measured."""

    formats: Tensor
    """int64 [layers, columns]: index into `format_names` of the last one in that column; -1 where
    the layer was not in low precision."""

    format_names: tuple[str, ...]

    totals: list[Totals] = field(default_factory=list[Totals])

    worst: dict[Ranking, list[Cell]] = field(default_factory=dict[Ranking, list[Cell]])
    """The worst cell of each of the worst operands, the worst first."""

    histories: list[OperandHistory] = field(default_factory=list[OperandHistory])
    """Of the operands in `worst`."""

    def in_order(self, names: Sequence[str]) -> Digest:
        """The same with the layers in the order of `names`, others behind them."""
        place = {name: index for index, name in enumerate(names)}
        order = sorted(range(len(self.layers)), key=lambda i: place.get(self.layers[i], len(place)))
        return replace(
            self,
            layers=tuple(self.layers[index] for index in order),
            grids={ranking: grid[order] for ranking, grid in self.grids.items()},
            formats=self.formats[order],
        )


def read_digest(run_dir: Path) -> Digest | None:
    """Read a run's statistics; None if it has none yet.

    Args:
        run_dir: the run's directory.

    Raises:
        OSError, RuntimeError, pyarrow.ArrowException: if they cannot be read.
    """
    try:
        table = read_statistics(run_dir, columns=["step", "sampled_at"])
    except FileNotFoundError:
        return None
    counts = _rows_by_step(table)
    if not counts:
        return None
    sampled_at = _steps_in(table["sampled_at"])
    del table
    steps = torch.tensor(list(counts))
    width = min(COLUMNS, len(steps))
    sums = _Sums(steps, width)
    partial: list[pa.Table] = []
    for rows in _chunks(run_dir, counts):
        if rows.num_rows:
            sums.add(rows)
            partial.append(_partial_totals(rows))
        del rows  # else it stays until the next one is there
    totals = _totals(partial)
    ranked: dict[Ranking, list[Totals]] = {name: _worst_of(totals, name) for name in RANKINGS}
    cells, histories = _histories(run_dir, ranked)
    edges = torch.arange(len(steps)) * width // len(steps)
    bounds = [steps[edges == column] for column in range(width)]
    return Digest(
        layers=tuple(sums.layers),
        columns=tuple((int(b[0]), int(b[-1])) for b in bounds),
        intervals=len(steps),
        rows=sum(counts.values()),
        sampled_at=sampled_at,
        grids=sums.grids,
        formats=sums.last_formats(),
        format_names=tuple(sums.formats),
        totals=totals,
        worst=cells,
        histories=histories,
    )


# -- reading --------------------------------------------------------------------------------------


def _rows_by_step(table: pa.Table) -> dict[int, int]:
    """Number of rows by step, ascending."""
    counted = pc.value_counts(table["step"]).to_pylist()
    return dict(sorted((entry["values"], entry["counts"]) for entry in counted))


def _steps_in(column: pa.ChunkedArray) -> Tensor:
    """int64: all steps that a column of texts names, ascending."""
    texts = column.unique().to_pylist()
    steps = {int(step) for text in texts for step in (text or "").split()}
    return torch.tensor(sorted(steps), dtype=torch.int64)


def _chunks(run_dir: Path, counts: dict[int, int]) -> Iterator[pa.Table]:
    """The table, by stretches of steps."""
    names = ["step", "layer", "operand", "format", "nonfinite", *RANKINGS, *WHAT_IF]
    first, held, steps = None, 0, list(counts)
    for step in steps:
        first = step if first is None else first
        held += counts[step]
        if held >= _CHUNK_ROWS or step == steps[-1]:
            within = (pc.field("step") >= first) & (pc.field("step") <= step)
            casts = pc.field("operand") != "output"
            yield read_statistics(run_dir, columns=names, filters=within & casts)
            first, held = None, 0


class _Sums:
    """What is gathered of layers and columns while the table goes by.

    Args:
        steps: int64 [intervals], ascending.
        width: columns.
    """

    def __init__(self, steps: Tensor, width: int) -> None:
        self.layers: dict[str, int] = {}
        self.formats: dict[str, int] = {}
        self._steps, self._width = steps, width
        self._last: Tensor = torch.full((0, width), -1, dtype=torch.int64)
        nothing = torch.full((0, width), torch.nan)
        self.grids: dict[Ranking, Tensor] = dict.fromkeys(RANKINGS, nothing)

    def add(self, rows: pa.Table) -> None:
        """Take in a stretch of the table."""
        layer = _codes(rows["layer"], self.layers)
        format = _codes(rows["format"], self.formats)
        self._grow()
        interval = torch.searchsorted(self._steps, torch.from_numpy(rows["step"].to_numpy().copy()))
        cell = layer * self._width + interval * self._width // len(self._steps)
        # The number of the interval above that of the format: the largest is the last one's.
        order = interval * 2**16 + format
        self._last.view(-1).scatter_reduce_(0, cell, order, "amax")
        for ranking, grid in self.grids.items():
            value = torch.from_numpy(rows[ranking].to_numpy().copy())
            known = ~value.isnan()
            how = "amin" if ranking == "sqnr_db" else "amax"
            of = value[known].clamp(-_MOST_DB, _MOST_DB)
            fresh = torch.full_like(grid, torch.inf if how == "amin" else -torch.inf).view(-1)
            fresh.scatter_reduce_(0, cell[known], of, how)
            fresh = fresh.view_as(grid).masked_fill_(fresh.view_as(grid).isinf(), torch.nan)
            combined = torch.fmin(grid, fresh) if how == "amin" else torch.fmax(grid, fresh)
            self.grids[ranking] = combined

    def last_formats(self) -> Tensor:
        """int64 [layers, columns]: the index of the last format; -1 where there was none."""
        return torch.where(self._last < 0, self._last, self._last % 2**16)

    def _grow(self) -> None:
        more = len(self.layers) - len(self._last)
        if more:
            empty = torch.full((more, self._width), torch.nan)
            self.grids = {name: torch.cat([grid, empty]) for name, grid in self.grids.items()}
            none = torch.full((more, self._width), -1, dtype=torch.int64)
            self._last = torch.cat([self._last, none])


def _codes(column: pa.ChunkedArray, known: dict[str, int]) -> Tensor:
    """int64 [rows]: each text's number in `known`, which learns those that are new to it."""
    encoded = column.combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    own = torch.from_numpy(encoded.indices.to_numpy(zero_copy_only=False).copy()).long()
    names = encoded.dictionary.to_pylist()
    used = torch.zeros(len(names), dtype=torch.bool)
    used[own] = True
    table = torch.zeros(len(names), dtype=torch.int64)
    for index, name in enumerate(names):
        if used[index]:
            table[index] = known.setdefault(name, len(known))
    return table[own]


# -- totals ---------------------------------------------------------------------------------------

_KEYS = ["layer", "operand", "format"]


def _partial_totals(rows: pa.Table) -> pa.Table:
    """Sums of a stretch, by operand and format."""
    finite = pc.min_element_wise(
        rows["sqnr_db"], pa.scalar(_MOST_DB, pa.float32()), skip_nulls=False
    )
    rows = rows.set_column(rows.column_names.index("sqnr_db"), "sqnr_db", finite)
    measured = [*RANKINGS, *WHAT_IF]
    wanted = [
        ("step", "count"),
        ("nonfinite", "sum"),
        *((name, "min" if name == "sqnr_db" else "max") for name in RANKINGS),
        *((name, "sum") for name in measured),
        *((name, "count") for name in measured),
    ]
    return rows.group_by(_KEYS).aggregate(wanted)


def _totals(partial: Sequence[pa.Table]) -> list[Totals]:
    if not partial:
        return []
    plain: list[pa.Table] = []
    for table in partial:
        texts = {name: table[name].cast(pa.string()) for name in _KEYS}
        plain.append(pa.table({n: texts.get(n, table[n]) for n in table.column_names}))
    table = pa.concat_tables(plain)
    how = {"_min": "min", "_max": "max", "_sum": "sum", "_count": "sum"}
    names = [name for name in table.column_names if name not in _KEYS]
    over = [(name, how[name[name.rindex("_") :]]) for name in names]
    found = table.group_by(_KEYS).aggregate(over).to_pylist()

    def total(row: dict[str, Any]) -> Totals:
        value = {name: row[f"{name}_{function}"] for name, function in over}
        worst = {n: value[f"{n}_{'min' if n == 'sqnr_db' else 'max'}"] for n in RANKINGS}
        mean = {
            name: value[f"{name}_sum"] / count if (count := value[f"{name}_count"]) else None
            for name in (*RANKINGS, *WHAT_IF)
        }
        return Totals(
            layer=row["layer"],
            operand=row["operand"],
            format=row["format"],
            intervals=value["step_count"],
            nonfinite=value["nonfinite_sum"] or 0,
            worst=worst,
            mean=mean,
        )

    return [total(row) for row in found]


def _worst_of(totals: Sequence[Totals], ranking: Ranking) -> list[Totals]:
    """The operands that lost most; none that lost nothing."""

    def badness(of: Totals) -> float:
        value = of.worst[ranking]
        if value is None:
            return -torch.inf
        return -value if ranking == "sqnr_db" else value

    least = -_MOST_DB if ranking == "sqnr_db" else 0.0
    lossy = [of for of in totals if badness(of) > least]
    return sorted(lossy, key=lambda of: (-badness(of), of.layer, of.operand))[:_SHOWN]


def _histories(
    run_dir: Path, ranked: dict[Ranking, list[Totals]]
) -> tuple[dict[Ranking, list[Cell]], list[OperandHistory]]:
    """The exact worst cells of the operands given, and their histories."""
    wanted = list(dict.fromkeys((of.layer, of.operand) for all in ranked.values() for of in all))
    if not wanted:
        return {ranking: [] for ranking in ranked}, []
    layers = sorted({layer for layer, _ in wanted})
    names = ["step", *_KEYS, *RANKINGS]
    chosen = pc.field("layer").isin(layers) & (pc.field("operand") != "output")
    table = read_statistics(run_dir, columns=names, filters=chosen).sort_by("step")
    histories: dict[tuple[str, str], OperandHistory] = {}
    cells: dict[Ranking, dict[tuple[str, str, str], Cell]] = {name: {} for name in ranked}
    worst = {(name, of.layer, of.operand, of.format): of for name in ranked for of in ranked[name]}
    columns = [table[name].to_pylist() for name in names]
    for values in zip(*columns, strict=True):
        row = dict(zip(names, values, strict=True))
        key = row["layer"], row["operand"]
        if key not in wanted:
            continue
        empty = OperandHistory(
            layer=key[0], operand=key[1], steps=[], formats=[], values={n: [] for n in RANKINGS}
        )
        history = histories.setdefault(key, empty)
        _add(history, row)
        for name in ranked:
            of = worst.get((name, *key, row["format"]))
            if of is not None and row[name] is not None and row[name] == of.worst[name]:
                cell = Cell(**{n: row[n] for n in ("step", *_KEYS)}, value=row[name])
                cells[name].setdefault((*key, row["format"]), cell)
    found: dict[Ranking, list[Cell]] = {
        name: [
            cells[name][place]
            for of in operands
            if (place := (of.layer, of.operand, of.format)) in cells[name]
        ]
        for name, operands in ranked.items()
    }
    return found, [histories[key] for key in wanted if key in histories]


def _add(history: OperandHistory, row: dict[str, Any]) -> None:
    """Add a row; of two formats in one interval the worse counts."""
    again = bool(history.steps) and history.steps[-1] == row["step"]
    if not again:
        history.steps.append(row["step"])
    history.formats.append(row["format"])
    for name in RANKINGS:
        value = None if row[name] is None else min(row[name], _MOST_DB)
        if again:
            both = [v for v in (history.values[name].pop(), value) if v is not None]
            value = (min if name == "sqnr_db" else max)(both, default=None)
        history.values[name].append(value)
