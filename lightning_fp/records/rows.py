"""From sums on a device to rows that people read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_fp.layers import LinearFormat
from lightning_fp.layers.histories.delayed_scales import AmaxRecord
from lightning_fp.layers.statistics_table import OPERANDS
from lightning_fp.numerics import (
    COLUMN,
    STATISTICS,
    amax_to_e8m0,
    amax_to_scale,
    combine,
    float_format,
    shares,
    what_if_shares,
)

CAST = ("input", "weight", "grad_output")
"""The operands that are cast; the output is not, its row has only its error."""

_WATCHED = [OPERANDS.index(operand) for operand in CAST]


@dataclass(frozen=True)
class Sampled:
    """What `StatisticsTable.take` returned, and in which formats the layers were."""

    layers: list[str]
    formats: list[LinearFormat]
    values: Tensor
    """float64 [layers, operands, statistics]."""
    steps: Tensor
    """int64 [layers], on the CPU: optimizer steps in which each layer was observed."""
    at: tuple[int, ...] = ()
    """The sampled steps: the number of each, 1 for the first."""


@dataclass(frozen=True)
class StatisticsRows:
    """One interval's rows: for each layer, operand and format that was seen."""

    layers: list[str]
    operands: list[str]
    formats: list[LinearFormat]
    values: dict[str, Tensor]
    """float64 [rows] each, on the CPU, by column of `records.tables.SCHEMA`; NaN where a column
    does not apply or nothing was measured."""
    sampled_at: list[str] = field(default_factory=list[str])
    """The sampled steps of each row's interval in which its layer was in its format, with spaces
    between them."""

    def __len__(self) -> int:
        return len(self.layers)

    @cached_property
    def low_precision(self) -> Tensor:
        """bool [rows]: operands that were cast to a low-precision format."""
        low = {format: not format.is_high_precision for format in set(self.formats)}
        rows = zip(self.formats, self.operands, strict=True)
        return torch.tensor([low[f] and o in CAST for f, o in rows], dtype=torch.bool)

    @property
    def padding_fraction(self) -> float:
        """Share of all layers' FLOPs that zeros take which fill up blocks; NaN if none was seen."""
        flops, share = self.values["flops"], self.values["padding_fraction"]
        whole = (flops / (1 - share))[flops > 0]
        return 1 - float(flops[flops > 0].sum() / whole.sum())

    def columns(self, step: int) -> dict[str, Any]:
        """The rows as columns of the table of the run.

        Args:
            step: the optimizer step at which the interval ends.
        """
        names = {format: format.name for format in set(self.formats)}
        return {
            "step": [step] * len(self),
            "layer": self.layers,
            "operand": self.operands,
            "format": [names[format] for format in self.formats],
            "sampled": [steps != "" for steps in self.sampled_at],
            "sampled_at": self.sampled_at,
            **{name: column.numpy() for name, column in self.values.items()},
        }


def statistics_rows(sampled: Sequence[Sampled], watched: AmaxRecord) -> StatisticsRows:
    """One interval's rows.

    Args:
        sampled: the sampled steps of the interval, over all ranks.
        watched: the same interval's every step, of layers with a history, over all ranks.
    """
    keys: dict[tuple[str, LinearFormat], int] = {}
    for part in (*sampled, watched):
        for key in zip(part.layers, part.formats, strict=True):
            # A layer that went to high precision when its step had already begun has no rows.
            if not key[1].is_high_precision:
                keys.setdefault(key, len(keys))
    formats = [format for _, format in keys]
    sums, steps = _sums(sampled, keys)
    amax, headroom, nonfinite, scale = _every_step(watched, keys).unbind(-1)
    sampled_amax, numel = sums[..., COLUMN["amax"]], sums[..., COLUMN["numel"]]

    # Histories are kept of some dynamic layers too; their scales and headroom are not those.
    every_step = amax > 0
    by_key = [[format.scaling == "delayed"] for format in formats]
    delayed = torch.tensor(by_key, dtype=torch.bool).view(-1, 1)
    delayed = delayed & torch.tensor([operand in CAST for operand in OPERANDS])
    amax = torch.where(every_step, amax, sampled_amax)
    nonfinite = torch.maximum(nonfinite, sums[..., COLUMN["nonfinite"]])
    limits, current = _limits_and_scales(formats, amax)
    scale = torch.where(delayed, torch.where(scale > 0, scale, torch.nan), current)
    left = torch.where(amax > 0, torch.log2(limits / (amax * scale)), torch.nan)
    headroom = torch.where(headroom < torch.inf, headroom, torch.nan)
    headroom = torch.where(delayed, headroom, left)
    values = {
        "sampled_steps": steps.unsqueeze(1).expand_as(amax),
        "amax": amax,
        "scale": scale,
        "headroom_bits": headroom,
        "nonfinite": nonfinite,
        **_measured(sums),
        **_what_if(sums),
    }
    seen = ((numel > 0) | (amax > 0) | (nonfinite > 0)).flatten()
    index = seen.nonzero().flatten().tolist()
    layers = [layer for layer, _ in keys]
    at: list[list[int]] = [[] for _ in keys]
    for part in sampled:
        for key in zip(part.layers, part.formats, strict=True):
            if key in keys:
                at[keys[key]] += part.at
    return StatisticsRows(
        layers=[layers[i // len(OPERANDS)] for i in index],
        operands=[OPERANDS[i % len(OPERANDS)] for i in index],
        formats=[formats[i // len(OPERANDS)] for i in index],
        values={name: column.flatten()[seen] for name, column in values.items()},
        sampled_at=[" ".join(map(str, at[i // len(OPERANDS)])) for i in index],
    )


def _sums(
    sampled: Sequence[Sampled], keys: dict[tuple[str, LinearFormat], int]
) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(len(keys), len(OPERANDS), len(STATISTICS), dtype=torch.float64)
    steps = torch.zeros(len(keys), dtype=torch.float64)
    for part in sampled:
        names = zip(part.layers, part.formats, strict=True)
        found = [(i, keys[key]) for i, key in enumerate(names) if key in keys]
        row, index = torch.tensor(found, dtype=torch.int64).view(-1, 2).unbind(1)
        values = part.values.cpu()[row]
        sums[index] = combine(sums[index], values)
        steps[index] += part.steps[row] * (values[..., COLUMN["numel"]] > 0).any(dim=1)
    return sums, steps


def _every_step(watched: AmaxRecord, keys: dict[tuple[str, LinearFormat], int]) -> Tensor:
    """float64 [keys, operands, 4], as `AmaxRecord.values`."""
    index = torch.tensor([keys[key] for key in zip(watched.layers, watched.formats, strict=True)])
    amax, headroom, nonfinite, scale = watched.values.cpu().double().unbind(-1)
    values = torch.zeros(4, len(keys), len(CAST), dtype=torch.float64)
    values[1] = torch.inf
    if len(index):
        rows = index.unsqueeze(1).expand_as(amax)  # a layer that came back is in there twice
        values[0].scatter_reduce_(0, rows, amax, "amax")
        values[1].scatter_reduce_(0, rows, headroom, "amin")
        values[2].index_add_(0, index, nonfinite)
        values[3].index_copy_(0, index, scale)
    whole = torch.zeros(len(keys), len(OPERANDS), 4, dtype=torch.float64)
    whole[:, _WATCHED] = values.permute(1, 2, 0)
    return whole


def _measured(sums: Tensor) -> dict[str, Tensor]:
    """The columns that only sampled steps have."""
    numel = sums[..., COLUMN["numel"]]
    columns = shares(sums)
    columns["numel"] = numel
    cast = torch.tensor([operand in CAST for operand in OPERANDS])
    for name in ("nonzero", "magnitude", "signal"):
        columns[name] = sums[..., COLUMN[name]]
    flops = sums[..., COLUMN["flops"]]  # of a layer, in its input's row
    columns["flops"] = torch.where(flops > 0, flops, torch.nan)
    for name, column in columns.items():
        known = numel > 0
        if name not in ("sqnr_db", "clamp_sqnr_db", "numel", "signal"):
            known = known & cast
        columns[name] = torch.where(known, column, torch.nan)
    if torch.isnan(columns["scale_spread_bits"]).all():
        del columns["scale_spread_bits"]  # one scale per tensor throughout
    return columns


def _what_if(sums: Tensor) -> dict[str, Tensor]:
    """The columns that only a monitor with `what_if=True` has."""
    columns = what_if_shares(sums)
    return {name: column for name, column in columns.items() if not torch.isnan(column).all()}


def _limits_and_scales(formats: Sequence[LinearFormat], amax: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each operand's format, and the scale where it follows from the amax.

    Args:
        formats: one per key.
        amax: float64 [keys, operands].

    Returns:
        float64 [keys, operands] each; NaN where there is no such thing.
    """
    limits, scales = torch.full_like(amax, torch.nan), torch.full_like(amax, torch.nan)
    keys: dict[LinearFormat, list[int]] = {}
    for key, format in enumerate(formats):
        keys.setdefault(format, []).append(key)
    for format, index in keys.items():
        for operand in CAST if format.input != "high" else ():
            column = OPERANDS.index(operand)
            limit = float_format(getattr(format, operand)).max
            limits[index, column] = limit
            scales[index, column] = 1.0
            if format.scaling == "dynamic":  # of the largest tensor, row or block
                largest = amax[index, column].float()
                scale = (
                    amax_to_e8m0(largest, limit)
                    if format.granularity == "mx"
                    else amax_to_scale(largest, limit, power_of_two=format.power_of_two)
                )
                scales[index, column] = scale.double()
    return limits, scales
