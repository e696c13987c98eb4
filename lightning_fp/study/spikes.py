"""Loss spikes: steps at which the loss stands out of the run's own noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fp.argument_types import checked
from lightning_fp.records.loss import Loss

MAD_TO_SIGMA = 1.4826
"""The standard deviation of a normal distribution is so many median absolute deviations."""

_LEAST_NOISE = 1e-3
"""Noise is taken for at least this share of the loss, so that a flat curve has no spikes."""

_CHUNK = 2**16
"""Points whose medians are taken at a time: the windows of all would fill the memory."""


@checked
@dataclass(frozen=True, kw_only=True)
class SpikeRule:
    """What counts as a loss spike."""

    threshold: float = 6.0
    """Height above the level, in robust standard deviations of the noise."""

    level: int = 16
    """Points just before whose median is the level that a spike rises from."""

    history: int = 64
    """Points just before whose distances from their level are the noise."""

    armed: int = 16
    """Points whose level must be known before anything can count as a spike."""

    refractory: int = 16
    """Steps without any outlier after which the next one is a new spike."""

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold must be greater than 0, got {self.threshold}")
        for name in ("level", "history", "armed", "refractory"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Spike:
    """The onset of one spike."""

    step: int
    loss: float
    height: float
    """Above the level, in robust standard deviations of the noise; inf if the loss is."""


@checked
def find_spikes(loss: Loss, rule: SpikeRule = SpikeRule()) -> list[Spike]:
    """The spikes of a loss curve, each at its first step.

    Level and noise are those of the points before, so that neither a falling loss nor a change of
    its noise makes a spike. A loss that is not finite is one spike, as long as it lasts.

    >>> curve = [2.0 + 0.01 * (i % 7) for i in range(100)]
    >>> curve[60] += 1.0
    >>> [spike.step for spike in find_spikes(Loss.of(range(100), curve))]
    [60]

    Args:
        loss: the curve.
        rule: what counts.
    """
    height = _heights(loss, rule)
    outliers = (height > rule.threshold).nonzero().flatten()
    steps = loss.steps[outliers]
    before = torch.cat([steps.new_full((1,), -rule.refractory - 1), steps])[: len(steps)]
    broken = ~torch.isfinite(loss.values)
    lasting = broken & torch.cat([broken.new_zeros(1), broken[:-1]])
    onsets = (steps - before > rule.refractory) & ~lasting[outliers]
    return [
        Spike(int(loss.steps[i]), float(loss.values[i]), float(height[i]))
        for i in outliers[onsets].tolist()
    ]


def armed_step(loss: Loss, rule: SpikeRule) -> int | None:
    """The first step that could be a spike; None if the curve is too short for any."""
    armed = (~_heights(loss, rule).isnan()).nonzero()
    return int(loss.steps[armed[0, 0]]) if len(armed) else None


def _heights(loss: Loss, rule: SpikeRule) -> Tensor:
    """Of each point over its level, in units of the noise: float64 [points]; NaN if not armed."""
    finite = torch.isfinite(loss.values)
    values = torch.where(finite, loss.values, torch.nan)
    level = _of_points_before(values, rule.level, _median)
    rise = values - level
    noise = MAD_TO_SIGMA * _of_points_before(rise, rule.history, _deviation)
    noise = torch.maximum(noise, _LEAST_NOISE * level.abs())
    noise = noise.clamp(min=torch.finfo(torch.float64).tiny)
    height = torch.where(finite, rise / noise, torch.inf)
    known = (~rise.isnan()).cumsum(0)
    armed = torch.cat([known.new_zeros(1), known[:-1]]) >= rule.armed
    return torch.where(armed, height, torch.nan)


def _of_points_before(values: Tensor, count: int, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """A statistic of the `count` points before each."""
    padded = torch.cat([values.new_full((count,), torch.nan), values[:-1]])
    windows = padded.unfold(0, count, 1)  # a view
    return torch.cat([statistic(part) for part in windows.split(_CHUNK)])


def _median(windows: Tensor) -> Tensor:
    return windows.nanmedian(dim=1).values


def _deviation(windows: Tensor) -> Tensor:
    return (windows - _median(windows).unsqueeze(1)).abs().nanmedian(dim=1).values
