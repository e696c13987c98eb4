"""The statistics of a cast, and how each combines over calls, micro-batches, steps and ranks.

Every one is a sum or a maximum, and this is the only place that says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_fp.numerics import devices


@dataclass(frozen=True)
class Statistic:
    """One column of a row of statistics."""

    name: str
    combine: Literal["max", "sum"]
    meaning: str


STATISTICS = (
    Statistic("amax", "max", "largest finite magnitude"),
    Statistic("nonfinite", "sum", "elements that are inf or NaN"),
    Statistic("numel", "sum", "elements"),
    Statistic("nonzero", "sum", "finite elements that are not zero"),
    Statistic("clamped", "sum", "finite elements that the clamp changed more than rounding would"),
    Statistic("excess", "sum", "sum of |scaled| beyond the format's max, over clamped elements"),
    Statistic("magnitude", "sum", "sum of |scaled|, over finite elements"),
    Statistic("underflow", "sum", "finite elements that are not zero and round to zero"),
    Statistic("signal", "sum", "sum of squares, over finite elements of the sampled rows"),
    Statistic("noise", "sum", "sum of squared cast errors, over the same elements"),
    Statistic("clamp_noise", "sum", "the same for clamping alone, without rounding"),
    Statistic("scales", "sum", "scales looked at, where rows or blocks have scales of their own"),
    Statistic("log_scale", "sum", "sum of their binary logarithms"),
    Statistic("log_scale_squared", "sum", "sum of the squares of these"),
    Statistic("flops", "sum", "FLOPs of forward and backward, of the layer"),
    Statistic("padding", "sum", "FLOPs beside these, of zeros that fill up blocks of tokens"),
    Statistic("size", "sum", "what-if: sum of |x|, over finite elements"),
    Statistic("delayed_numel", "sum", "what-if: elements for which there was a delayed scale"),
    Statistic("delayed_clamped", "sum", "elements that delayed scaling would have clamped"),
    Statistic("delayed_excess", "sum", "sum of |x| beyond what delayed scaling can hold"),
    Statistic("sampled_nonzero", "sum", "what-if: finite non-zero elements of the sampled rows"),
    Statistic("delayed_underflow", "sum", "of these, flushed to zero by delayed scaling"),
    Statistic("dynamic_underflow", "sum", "of these, flushed to zero by dynamic scaling"),
    Statistic("rowwise_underflow", "sum", "of these, flushed to zero by a scale per row"),
    Statistic("block_underflow", "sum", "of these, flushed to zero by a scale per block of 128"),
    Statistic("other_underflow", "sum", "of these, flushed by e5m2 for e4m3 or the other way"),
)
"""The columns, in order. The first two are what is recorded at every step; from "size" on they are
what other scalings would have done to the same tensors, 0 where that was not asked for."""

MAXIMA = [statistic.combine for statistic in STATISTICS].index("sum")
"""How many columns combine by max; they stand first, all others are sums."""

WHAT_IF = STATISTICS[[statistic.name for statistic in STATISTICS].index("size") :]
"""The columns of `what_if_statistics`."""

COLUMN = {statistic.name: index for index, statistic in enumerate(STATISTICS)}
"""Index of each column by name."""


def wide_dtype(device: torch.device) -> torch.dtype:
    """What sums are kept in: float64, and float32 on MPS, which has nothing wider."""
    type = devices.CPU_STANDS_IN_FOR if device.type == "cpu" else device.type
    return torch.float32 if type == "mps" else torch.float64


def wide(x: Tensor) -> Tensor:
    """A tensor in the dtype that sums are kept in where it is."""
    return x.to(wide_dtype(x.device))


def combine(one: Tensor, other: Tensor) -> Tensor:
    """Two rows of statistics as one: of calls, micro-batches, steps or parts of an operand.

    Args:
        one: [..., width], the first `width` columns of `STATISTICS`.
        other: same shape.
    """
    maxima = torch.maximum(one[..., :MAXIMA], other[..., :MAXIMA])
    return torch.cat([maxima, one[..., MAXIMA:] + other[..., MAXIMA:]], dim=-1)
