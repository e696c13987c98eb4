"""The statistics of all layers: switched on for a step, taken out in one piece."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fp.kernels.memory import fold_gradients
from lightning_fp.layers.experts.rows import ExpertsRow
from lightning_fp.layers.format import LinearFormat
from lightning_fp.layers.histories.delayed_scales import first_device
from lightning_fp.layers.linear import FPLinear
from lightning_fp.layers.observe import OperandStatistics, Sampling
from lightning_fp.layers.switchable import SwitchableLayer
from lightning_fp.numerics import MAXIMA, STATISTICS
from lightning_fp.numerics.combining import wide_dtype
from lightning_fp.rank_group import current_group, ranks

OPERANDS = ("input", "weight", "output", "grad_output")
"""The rows of a layer's statistics, in order."""


class ObservedLayer(SwitchableLayer, Protocol):
    """A layer of the table that can collect statistics."""

    statistics: OperandStatistics | None
    """Where they go; None: nowhere."""


def observable(layers: Mapping[str, SwitchableLayer]) -> dict[str, ObservedLayer]:
    """Those of a table's layers that can collect statistics."""
    kinds = FPLinear, ExpertsRow
    return {name: layer for name, layer in layers.items() if isinstance(layer, kinds)}


class StatisticsTable:
    """Collects `[layers, operands, statistics]` on the device; the host reads it when it likes.

    Each layer collects where it computes, which need not be where its weight is between steps.

    Args:
        layers: the layers to observe, by name.
        stride: SQNR and the error split look at every `stride`-th row; all else at all rows.
        what_if: whether to compute what other scalings would have done; for that of delayed
            scaling the layers' histories must be kept, see `PrecisionMap.follow`.
    """

    def __init__(
        self, layers: Mapping[str, ObservedLayer], *, stride: int = 8, what_if: bool = False
    ) -> None:
        self._layers = dict(layers)
        device = first_device(layers.values())
        offset = torch.zeros((), dtype=torch.int64, device=device)
        self._sampling = Sampling(stride, offset, what_if)
        width = len(STATISTICS)
        self._gradients = torch.zeros(len(layers), width, dtype=wide_dtype(device), device=device)
        for layer in self._layers.values():
            layer.statistics = OperandStatistics(self._sampling)

    @property
    def names(self) -> list[str]:
        """The observed layers, in the order of `take`."""
        return list(self._layers)

    def collect(self, on: bool, turn: int = 0) -> None:
        """Collect in the forwards from here on, or stop. Call between steps.

        Layers that are in high precision at this moment are left out.

        Args:
            on: whether to collect.
            turn: which rows to sample: those of one turn are followed by those of the next.
        """
        for layer in self._layers.values():
            layer.collect = on and not layer.format.is_high_precision
        if on:
            self._sampling.turn_to(turn)

    def collecting(self) -> list[bool]:
        """Which layers collect now, in the order of `take`."""
        return [layer.collect for layer in self._layers.values()]

    def formats(self) -> list[LinearFormat]:
        """Every layer's format now, in the order of `take`."""
        return [layer.format for layer in self._layers.values()]

    @torch.no_grad()
    def fold(self) -> None:
        """After a backward: take in the statistics of grad_output."""
        records = self._records()
        if records and self._gradients.device != records[0].recorded.device:  # the first one's
            device = records[0].recorded.device
            self._gradients = self._gradients.to(device, wide_dtype(device))
        fold_gradients(records, self._gradients)

    @torch.no_grad()
    def take(self) -> Tensor:
        """All that was collected on this rank since the last time; then start anew.

        Returns:
            float64 [layers, operands, statistics], where the first layer computes.
        """
        self.fold()
        recorded = [record.recorded for record in self._records()]
        if not recorded:
            return self._gradients.new_zeros(0, len(OPERANDS), len(STATISTICS))
        here = torch.stack([each.to(self._gradients.device) for each in recorded])
        table = torch.cat([here, self._gradients.unsqueeze(1)], dim=1)
        torch._foreach_zero_(recorded)  # pyright: ignore[reportPrivateImportUsage]
        self._gradients.zero_()
        return table

    def close(self) -> None:
        """Stop observing."""
        for layer in self._layers.values():
            layer.collect, layer.statistics = False, None

    def _records(self) -> list[OperandStatistics]:
        layers = self._layers.values()
        return [layer.statistics for layer in layers if layer.statistics is not None]


@torch.no_grad()
def over_ranks(table: Tensor) -> Tensor:
    """Combine what `take` returned over all ranks; a collective, call it alike on all.

    Args:
        table: float64 [..., statistics].

    Returns:
        The same on every rank, same shape.
    """
    if ranks() == 1:
        return table
    maxima, sums = table[..., :MAXIMA].contiguous(), table[..., MAXIMA:].contiguous()
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=current_group())
    dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=current_group())
    return torch.cat([maxima, sums], dim=-1)
