"""Means and co-moments of several variables, in a form that adds up over updates and ranks.

The usual sums of squares lose their digits where the spread is small against the mean, as with the
probabilities of a confident policy. These are about the mean (Chan, Golub and LeVeque, 1979).
"""

from __future__ import annotations

import torch
from torch import Tensor


def no_moments(variables: int) -> Tensor:
    """Those of no elements at all; float64 [variables + 1, variables + 1]."""
    return torch.zeros(variables + 1, variables + 1, dtype=torch.float64)


def moments_of(values: Tensor, valid: Tensor) -> Tensor:
    """Moments of the elements that count.

    Args:
        values: float64 [variables, elements], finite.
        valid: bool [elements], which of them count.

    Returns:
        float64 [variables + 1, variables + 1]: the number of elements at [0, 0], the means at
        [0, 1:], and at [1:, 1:] the sums of products of deviations from them.
    """
    count = valid.sum().double()
    values = torch.where(valid, values, 0.0)
    means = values.sum(dim=1) / count.clamp(min=1)
    deviations = torch.where(valid, values - means.unsqueeze(1), 0.0)
    moments = values.new_zeros(len(values) + 1, len(values) + 1)
    moments[0, 0] = count
    moments[0, 1:] = means
    moments[1:, 1:] = deviations @ deviations.T
    return moments


def merge_moments(parts: Tensor) -> Tensor:
    """What `moments_of` would have returned for all parts together.

    Args:
        parts: float64 [parts, variables + 1, variables + 1].
    """
    counts, means = parts[:, 0, 0], parts[:, 0, 1:]
    share = counts / counts.sum().clamp(min=1)
    mean = share @ means
    shift = means - mean
    merged = torch.zeros_like(parts[0])
    merged[0, 0] = counts.sum()
    merged[0, 1:] = mean
    merged[1:, 1:] = parts[:, 1:, 1:].sum(dim=0) + (shift.T * counts) @ shift
    return merged


def means_of(moments: Tensor) -> Tensor:
    """float64 [variables], NaN for no elements."""
    return torch.where(moments[0, 0] > 0, moments[0, 1:], torch.nan)


def covariance(moments: Tensor) -> Tensor:
    """Of the population; float64 [variables, variables], NaN for no elements."""
    return moments[1:, 1:] / moments[0, 0]
