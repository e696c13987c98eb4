"""Delayed scaling: a cast scaled by what earlier steps saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_fp.argument_types import checked
from lightning_fp.numerics.scaling import AMAX_LOWER_BOUND

LONGEST = 2**16
"""Steps that a history may have: every operand of every layer keeps one. 1024 are usual at most."""


@checked
@dataclass(frozen=True)
class DelayedScaling:
    """How the scale follows from the amax history.

    >>> DelayedScaling(history_len=1, margin=1)
    DelayedScaling(history_len=1, algorithm='max', margin=1)
    """

    history_len: int = 16
    """Steps remembered. Long ones keep an old outlier in force, short ones forget it."""

    algorithm: Literal["max", "most_recent"] = "max"
    """The amax a scale is made for: the history's largest, or its newest."""

    margin: int = 0
    """Binary orders of magnitude left free above that amax, against values that grow."""

    def __post_init__(self) -> None:
        if not isinstance(self.history_len, int) or self.history_len < 1:
            raise ValueError(f"history_len must be at least 1, got {self.history_len!r}")
        if self.history_len > LONGEST:
            raise ValueError(f"history_len must be at most {LONGEST}, got {self.history_len}")
        if self.algorithm not in ("max", "most_recent"):
            raise ValueError(f"algorithm must be 'max' or 'most_recent', got {self.algorithm!r}")
        if not isinstance(self.margin, int) or self.margin < 0:
            raise ValueError(f"margin must be an integer of at least 0, got {self.margin!r}")


def advance_history(history: Tensor, amax: Tensor) -> Tensor:
    """Put this step's amax in front.

    Args:
        history: float32 [..., history_len], newest first, 0 where there is no entry yet.
        amax: float32 [...]. 0 (nothing seen), inf and NaN leave their history as it is.

    Returns:
        The new history, same shape.
    """
    seen = (amax > 0) & torch.isfinite(amax)
    advanced = torch.cat([amax.unsqueeze(-1), history[..., :-1]], dim=-1)
    return torch.where(seen.unsqueeze(-1), advanced, history)


def history_scale(history: Tensor, limit: Tensor, config: DelayedScaling) -> Tensor:
    """The scale for the next step.

    Args:
        history: float32 [..., history_len], newest first.
        limit: float32, broadcastable to [...]: largest finite value of each operand's format.
        config: which entry counts, and the margin.

    Returns:
        float32 [...]; 0 where the history has no entry, which stands for "no scale yet".
    """
    amax = history.amax(dim=-1) if config.algorithm == "max" else history[..., 0]
    scale = limit / amax.clamp(min=AMAX_LOWER_BOUND) / 2.0**config.margin
    return torch.where(amax > 0, scale, 0.0)
