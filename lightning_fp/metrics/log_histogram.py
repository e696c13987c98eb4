"""Quantiles of magnitudes over many orders, from counts that add up over updates and ranks.

Bins are a fixed share of an octave wide, so that every quantile is within 0.55 % of its value:
finer than quantiles of a few thousand tokens are known.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS_PER_OCTAVE = 64
"""Half a bin is 2**(1/128) - 1 = 0.54 %."""

LOWEST, HIGHEST = -40, 16
"""Powers of two between which magnitudes are resolved: below 9e-13 they count as 0."""

BINS = (HIGHEST - LOWEST) * BINS_PER_OCTAVE + 2
"""One more at each end, for what lies outside."""


def histogram(magnitudes: Tensor, valid: Tensor) -> Tensor:
    """Counts by logarithm.

    Args:
        magnitudes: float64 [elements], 0 or more.
        valid: bool [elements], which of them count.

    Returns:
        int64 [BINS].
    """
    octaves = torch.log2(torch.where(valid, magnitudes, 1.0)) - LOWEST
    bins = (octaves * BINS_PER_OCTAVE).floor().clamp(-1, BINS - 2).long() + 1
    counts = torch.zeros(BINS, dtype=torch.long, device=magnitudes.device)
    # Neither bincount nor a boolean index: both would wait for the device.
    return counts.index_add_(0, bins, valid.long())


def quantile(counts: Tensor, share: float) -> Tensor:
    """The smallest magnitude that at least this share of the elements does not exceed.

    Args:
        counts: int64 [BINS].
        share: between 0 and 1.

    Returns:
        float64 scalar, the middle of its bin: 0 in the lowest and inf in the highest bin, NaN if
        nothing was counted.
    """
    below = counts.cumsum(0)
    total = below[-1:]
    rank = (total.double() * share).ceil().clamp(min=1).long()
    bin = torch.searchsorted(below, rank).clamp(max=BINS - 1)
    middle = torch.exp2((bin.double() - 0.5) / BINS_PER_OCTAVE + LOWEST)
    middle = torch.where(bin == 0, 0.0, torch.where(bin == BINS - 1, torch.inf, middle))
    return torch.where(total > 0, middle, torch.nan)[0]
