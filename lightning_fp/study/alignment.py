"""Is a series larger around some events than elsewhere? Tested by shifting the events."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_fp.choices import unknown

Correction = Literal["max", "holm"]
"""How p-values are corrected for the number of series: by the distribution of the largest score
over all of them (Westfall and Young's single-step maxT: Resampling-Based Multiple Testing, 1993),
or after Holm (Scand. J. Statist. 6, 1979), which uses the p-values alone."""

_EPSILON = 1e-9
"""Scores this close are ties: a Fourier transform rounds."""

_FLAT = 1e-12
"""Scores that differ by less are all the same."""


def event_average(series: Tensor, events: Tensor, window: int) -> Tensor:
    """The average course of a series around the events.

    Args:
        series: float64 [steps]; NaN where unknown.
        events: int64 [events], positions in the series.
        window: how far to look before and after.

    Returns:
        float64 [2 * window + 1]; NaN where no event has a known value.
    """
    place = events.unsqueeze(1) + torch.arange(-window, window + 1)
    inside = (place >= 0) & (place < len(series))
    course = torch.where(inside, series[place.clamp(0, len(series) - 1)], torch.nan)
    return course.nanmean(dim=0)


def shifted_scores(series: Tensor, events: Tensor, window: int) -> Tensor:
    """How large a series is just before and at the events, for every circular shift of them.

    Shifting keeps the order within the series and within the events, so that the autocorrelation
    of either does not pass for a tie. Of each window the largest value counts, and its rank, so
    that neither the quiet steps of a window nor one huge value decide.

    Args:
        series: float64 [steps]; NaN where unknown.
        events: int64 [events], positions in the series.
        window: steps before an event that count; the event itself does too.

    Returns:
        float64 [steps]: the score of the shift by 0, 1, 2, ...: the mean rank over the events, in
        standard deviations over the shifts. NaN where nothing is known within the windows.
    """
    largest = _largest_before(series, window)
    known = ~largest.isnan()
    weight = torch.zeros_like(series)
    weight.index_add_(0, events, torch.ones_like(events, dtype=series.dtype))
    rows = torch.stack([_ranks(largest, known), known.to(series.dtype)])
    total, count = _correlation(rows, weight)
    mean = torch.where(count > 0.5, total / count, torch.nan)
    centred = mean - mean.nanmean()
    spread = centred.square().nanmean().sqrt()
    return torch.where(spread > _FLAT, centred / spread, centred * 0.0)


def shift_p_value(scores: Tensor) -> float:
    """The share of the shifts, the actual placement included, that score at least as high.

    That is (1 + count) / (1 + n) over all n other shifts: exact, without a random draw.

    Args:
        scores: what `shifted_scores` returned.
    """
    if scores[0].isnan():
        return 1.0
    valid = scores[~scores.isnan()]
    return float((valid >= scores[0] - _EPSILON).sum()) / len(valid)


def corrected(p_values: Tensor, scores: Tensor, largest: Tensor, how: Correction) -> Tensor:
    """P-values corrected for the number of series.

    Args:
        p_values: float64 [series].
        scores: float64 [series], of the actual placement; NaN where there is none.
        largest: float64 [steps], the largest score over all series, by shift.
        how: see `Correction`.

    Returns:
        float64 [series]: the chance to see any series tied as closely if none is.

    Raises:
        ValueError: if there is no such correction.
    """
    if how == "max":
        reached = largest.sort().values
        below = torch.searchsorted(reached, scores.nan_to_num(nan=-torch.inf) - _EPSILON)
        share = (len(reached) - below) / max(1, len(reached))
        return torch.maximum(p_values, share.to(p_values.dtype))
    if how == "holm":
        order = p_values.argsort(stable=True)
        factor = torch.arange(len(p_values), 0, -1, dtype=p_values.dtype)
        stepped = (p_values[order] * factor).clamp(max=1.0)
        stepped = stepped.cummax(dim=0).values if len(stepped) else stepped
        return torch.empty_like(p_values).index_copy_(0, order, stepped)
    raise unknown("correction", how, get_args(Correction))


def _largest_before(series: Tensor, window: int) -> Tensor:
    """The largest known value of each step and the `window` steps before it, around the circle."""
    filled = torch.where(series.isnan(), -torch.inf, series)
    around = filled[torch.arange(-window, len(series)) % len(series)]
    largest = around.unfold(0, window + 1, 1).amax(dim=1)
    return torch.where(largest.isinf(), torch.nan, largest)


def _ranks(series: Tensor, known: Tensor) -> Tensor:
    """From -0.5 to 0.5, equal values sharing theirs; 0 where unknown."""
    _, place, count = torch.unique(series[known], return_inverse=True, return_counts=True)
    middle = count.cumsum(0) - (count - 1) / 2
    ranks = torch.zeros_like(series)
    ranks[known] = (middle[place].to(series.dtype) - 0.5) / max(1, len(place)) - 0.5
    return ranks


def _correlation(series: Tensor, weight: Tensor) -> Tensor:
    """Sum over t of weight[t] * series[..., t + shift], for every shift around the circle."""
    steps = series.shape[-1]
    product = torch.fft.rfft(series) * torch.fft.rfft(weight).conj()
    return torch.fft.irfft(product, n=steps)
