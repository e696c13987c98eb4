"""How much each operand clamped over the steps of a run, from its statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyarrow as pa
import torch
from torch import Tensor

from lightning_fp.choices import check_choice
from lightning_fp.records.rows import CAST

Statistic = Literal["clamped_mass", "overflow_bits"]
"""The clamped share of the magnitude on sampled steps; or by how many bits the largest value was
beyond the format's range, which under delayed scaling is exact at every step."""

CLAMPS_FROM = 0.05
"""Bits beyond the largest value from which on e4m3 clamps; less is rounded back to it."""

_COLUMNS = ("step", "layer", "operand", "sampled_steps", "headroom_bits", "clamped_mass")


@dataclass(frozen=True, eq=False)
class ClampSeries:
    """One statistic of the operands that clamped at all, by interval of logging."""

    keys: list[tuple[str, str]]
    """Layer and operand of each series."""

    silent: int
    """Operands left out because they never clamped."""

    begins: Tensor
    """int64 [intervals]; interval i covers the steps from begins[i] + 1 to ends[i]."""

    ends: Tensor
    """int64 [intervals], ascending."""

    values: Tensor
    """float64 [series, intervals]; NaN where nothing was measured."""

    samples: Tensor
    """int64 [series, intervals]: measurements in it: sampled steps, or for overflow_bits 1."""

    @property
    def resolution(self) -> int:
        """Median length of an interval, in steps."""
        return int((self.ends - self.begins).median())

    def interval_of(self, steps: Tensor) -> Tensor:
        """The interval that each step lies in; clipped to the first and the last.

        Args:
            steps: int64, any shape.
        """
        return torch.searchsorted(self.ends, steps).clamp(0, len(self.ends) - 1)


def clamp_series(statistics: pa.Table, statistic: Statistic = "clamped_mass") -> ClampSeries:
    """Arrange a run's statistics by operand and interval.

    A row holds for the whole interval of logging that it ends. Where no step of it was sampled,
    but the largest value is known to have stayed in range, the clamped mass is known to be 0. Of
    several formats in one interval the worse counts.

    Args:
        statistics: what `lightning_fp.records.read_statistics` returned.
        statistic: what to look at.

    Raises:
        ValueError: if columns or rows are missing, or there is no such statistic.
    """
    check_choice("statistic", statistic, get_args(Statistic))
    if missing := [name for name in _COLUMNS if name not in statistics.column_names]:
        raise ValueError(
            f"statistics must have the columns {', '.join(_COLUMNS)}; {', '.join(missing)} missing"
        )
    step, headroom, mass, sampled = (
        torch.tensor(statistics[name].cast(pa.float64()).to_numpy())
        for name in ("step", "headroom_bits", "clamped_mass", "sampled_steps")
    )
    layers, layer = _codes(statistics["layer"])
    operands, operand = _codes(statistics["operand"])
    cast = torch.tensor([name in CAST for name in operands], dtype=torch.bool)
    rows = cast[operand].nonzero().flatten() if len(operand) else operand
    if not len(rows):
        raise ValueError("statistics must have rows of operands, got none; has the run logged any?")

    ends, interval = torch.unique(step[rows].long(), return_inverse=True)
    series, place = torch.unique((layer * len(operands) + operand)[rows], return_inverse=True)
    if statistic == "clamped_mass":
        value = torch.where(mass.isnan() & (headroom >= -CLAMPS_FROM), 0.0, mass)[rows]
        count = torch.where(mass.isnan(), 0.0, sampled.nan_to_num())[rows]
    else:
        value = torch.where(headroom >= -CLAMPS_FROM, 0.0, -headroom)[rows]  # NaN stays
        count = (~value.isnan()).double()
    shape = len(series), len(ends)
    cell, known = place * shape[1] + interval, ~value.isnan()
    values = torch.full((shape[0] * shape[1],), -torch.inf, dtype=torch.float64)
    values.scatter_reduce_(0, cell[known], value[known], "amax")
    samples = torch.zeros_like(values).index_add_(0, cell, count).view(shape)
    values = torch.where(values.isinf(), torch.nan, values).view(shape)

    lengths = ends.diff()
    first = int(lengths.median() if len(lengths) else ends[0])
    begins = torch.cat([(ends[:1] - first).clamp(min=0), ends[:-1]])
    loud = (values > 0).any(dim=1)
    return ClampSeries(
        keys=[
            (layers[key // len(operands)], operands[key % len(operands)])
            for key in series[loud].tolist()
        ],
        silent=int((~loud).sum()),
        begins=begins,
        ends=ends,
        values=values[loud],
        samples=samples[loud].long(),
    )


def _codes(column: pa.ChunkedArray) -> tuple[list[str], Tensor]:
    """The distinct texts of a column, sorted, and the index among them of each row."""
    encoded: Any = column.cast(pa.string()).combine_chunks().dictionary_encode()
    texts: list[str] = encoded.dictionary.to_pylist()
    order = sorted(range(len(texts)), key=texts.__getitem__)
    rank = torch.empty(len(texts), dtype=torch.int64)
    rank[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(texts))
    codes = torch.tensor(encoded.indices.to_numpy(), dtype=torch.int64)
    return [texts[i] for i in order], rank[codes] if len(codes) else codes
