"""What bounds on importance weights cut off, how many samples are left, and the bias they bring.

Everything that nearly cancels is formed from `expm1`: between two FP16 engines weights differ from
1 by 1e-4, and of the 1e-8 that their variance is, float32 knows nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fp.rl.log_ratios import LogRatios


@dataclass(frozen=True, kw_only=True)
class CorrectionReport:
    """Of one batch on this rank: scalars, on the device of the log-probabilities.

    float64 (float32 on MPS); means are over units, that is over what has a weight of its own,
    tokens or sequences. Without any they are NaN.
    """

    units: Tensor
    """Tokens inside of the mask, or sequences with any, that have a weight."""

    nonfinite: Tensor
    """Tokens inside of the mask of which a log-probability is inf or NaN."""

    high_share: Tensor
    """Share of units above `high`."""

    low_share: Tensor
    """Share of units below `low`."""

    mean_excess: Tensor
    """Mean weight less 1. The true weights' is 0 but for chance, so this is near `-bias`."""

    deviation: Tensor
    """Standard deviation of the weights."""

    effective_sample_size: Tensor
    """`mean(w)**2 / mean(w**2)`: the share of the samples that as many equal ones would be; 1 where
    all weigh the same, 0 where none weighs anything."""

    bias: Tensor
    """Mean absolute change of the weights by the bounds. A mean over samples of anything between -1
    and 1, with these weights, is off by this much at most from that with the true weights."""

    uncorrected: Tensor
    """Mean of `abs(pi / mu - 1)`: the same of no correction at all, twice the total variation."""

    advantage_bias: Tensor | None
    """Mean of the change of the weights times the advantage: what the bounds add to the mean of
    weighted advantages. None without advantages."""


def report_of(
    ratios: LogRatios,
    low: float,
    high: float,
    *,
    truncates: bool,
    advantages: Tensor | None = None,
) -> CorrectionReport:
    """See `CorrectionReport`.

    Args:
        ratios: of the batch.
        low: smallest weight, 0 or more.
        high: largest weight.
        truncates: whether weights beyond become the bound; they become 0 otherwise.
        advantages: [batch, tokens] or [batch, 1]; None: none.

    Raises:
        ValueError: if advantages have another shape.
    """
    r, valid = ratios.units()
    count = valid.sum().to(r.dtype)

    def mean(values: Tensor) -> Tensor:
        return torch.where(valid, values, 0.0).sum() / count

    weight = r.exp()
    above, below = weight > high, weight < low
    changed = -weight
    if truncates:
        # high - w and low - w, without the digits that a difference loses
        to_high = -high * (r - math.log(high)).expm1()
        to_low = -low * (r - math.log(low)).expm1() if low else torch.zeros_like(r)
        changed = torch.where(above, to_high, to_low)
    change = torch.where(above | below, changed, 0.0)
    beyond = torch.where(above, high - 1, low - 1) if truncates else torch.full_like(r, -1.0)
    excess = torch.where(above | below, beyond, r.expm1())

    mean_excess = mean(excess)
    squared = (1 + mean_excess).square()
    variance = mean((excess - mean_excess).square())
    share = torch.where(squared > 0, squared / (squared + variance), 0.0)
    return CorrectionReport(
        units=valid.sum(),
        nonfinite=ratios.nonfinite,
        high_share=mean(above.to(r.dtype)),
        low_share=mean(below.to(r.dtype)),
        mean_excess=mean_excess,
        deviation=variance.sqrt(),
        effective_sample_size=torch.where(count > 0, share, torch.nan),
        bias=mean(change.abs()),
        uncorrected=mean(r.expm1().abs()),
        advantage_bias=None if advantages is None else _advantage_bias(ratios, change, advantages),
    )


def _advantage_bias(ratios: LogRatios, change: Tensor, advantages: Tensor) -> Tensor:
    """Over tokens, at every level: each counts once in a policy gradient."""
    shape = tuple(ratios.valid.shape)
    if tuple(advantages.shape) not in (shape, (shape[0], 1)):
        raise ValueError(
            f"advantages must be [batch, tokens] or [batch, 1], {shape} or {(shape[0], 1)}, got"
            f" {tuple(advantages.shape)}"
        )
    product = change * advantages.detach().to(change.dtype)
    counts = ratios.valid.sum().to(change.dtype)
    return torch.where(ratios.valid, product, 0.0).sum() / counts
