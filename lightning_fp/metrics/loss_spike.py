"""How often the loss jumps, as a torchmetric."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_fp.argument_types import checked
from lightning_fp.metrics.base import Float64Metric

_LONGEST = 2**20
"""A window takes 8 bytes for each step, and a second pass over all of them at every step."""

_FLAT = 1e-10
"""A window with a smaller standard deviation than this has no noise to measure a jump by."""


class LossSpikeScore(Float64Metric):
    """Share of the steps whose loss is far above those before it.

    A step is a spike if its loss is more than `threshold` standard deviations above the mean of the
    `window` finite losses before it, or is not finite. The first `window` steps cannot be spikes,
    unless they are not finite, but count as steps.

    This is OLMo 2's spike score (arXiv 2501.00656, seven standard deviations), over the window of
    OLMo-core's `StabilityMonitorCallback`, 128 steps; the paper's own is longer.

    Each rank watches the losses it is given. With `torch.distributed`, `compute` returns the share
    over the steps of all ranks; ranks that are given the same, already averaged loss each return
    what one would. The losses kept as the window are the rank's own and are never exchanged.

    Args:
        window: steps that a loss is compared with.
        threshold: standard deviations above their mean.
        kwargs: torchmetrics' own options, e.g. `sync_on_compute`.

    Raises:
        ValueError: if `window` is less than 2, or `threshold` not above 0.

    >>> score = LossSpikeScore(window=4)
    >>> score.update(torch.tensor([2.0, 2.1, 2.0, 2.1, 3.0]))
    >>> score.compute().item()
    0.2
    """

    full_state_update = True  # a step is judged by those before it
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    spikes: Tensor
    steps: Tensor
    recent: Tensor

    @checked
    def __init__(self, *, window: int = 128, threshold: float = 7.0, **kwargs: Any) -> None:
        if window < 2:
            raise ValueError(f"window must be at least 2, got {window}")
        if window > _LONGEST:
            raise ValueError(f"window must be at most {_LONGEST}, got {window}")
        if not threshold > 0:
            raise ValueError(f"threshold must be greater than 0, got {threshold}")
        super().__init__(**kwargs)
        self.window = window
        self.threshold = threshold
        self.add_state("spikes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("steps", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        # gathered as rows: one per rank, which `compute` does not look at
        self.add_state(
            "recent", torch.full((window,), math.nan, dtype=torch.float64), dist_reduce_fx=None
        )

    def update(self, loss: Tensor | float) -> None:
        """Take in the losses of one or more steps, oldest first.

        Args:
            loss: scalar, or 1-d.

        Raises:
            ValueError: if it has more dimensions.
        """
        losses = torch.as_tensor(loss, dtype=torch.float64, device=self.recent.device).detach()
        if losses.ndim > 1:
            raise ValueError(
                f"loss must be a scalar or 1-d, one value per step, got {tuple(losses.shape)}; give"
                " it the mean over the batch"
            )
        for value in losses.reshape(-1):
            self._step(value)

    def forward(self, loss: Tensor | float) -> Tensor:
        """Take in losses, and return the share of spikes among them, on this rank.

        Args:
            loss: scalar, or 1-d.
        """
        spikes, steps = self.spikes, self.steps
        self.update(loss)
        share = (self.spikes - spikes).double() / (self.steps - steps).clamp(min=1)
        self._forward_cache = share
        return share

    def compute(self) -> Tensor:
        """Spikes over steps, of all ranks; 0 before the first step; float64 scalar."""
        return self.spikes.double() / self.steps.clamp(min=1)

    def _step(self, loss: Tensor) -> None:
        """Without waiting for the device."""
        finite = loss.isfinite()
        mean = self.recent.mean()  # NaN until the window is full, which no loss is above
        deviation = self.recent.std(correction=0)
        above = (loss > mean + self.threshold * deviation) & (deviation >= _FLAT)
        self.spikes = self.spikes + (above | ~finite)
        self.steps = self.steps + 1
        self.recent = torch.where(
            finite, torch.cat([self.recent[1:], loss.reshape(1)]), self.recent
        )
