"""What a cast to a small format does to a tensor, as torchmetrics."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_fp.metrics.base import Float64Metric
from lightning_fp.numerics import STATISTICS, format_of_dtype, operand_statistics, shares


class CastMetric(Float64Metric):
    """Sums what casts do; the share is formed at the end, so that updates and ranks add up.

    Non-finite values are left out.

    Args:
        kwargs: torchmetrics' own options, e.g. `sync_on_compute`.
    """

    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    share: ClassVar[str]
    """Which of `lightning_fp.numerics.shares` this is."""

    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        nothing = torch.zeros(len(STATISTICS), dtype=torch.float64)
        self.add_state("sums", nothing, dist_reduce_fx="sum")

    def update(self, x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> None:
        """Take in one cast.

        Args:
            x: any shape, any floating-point dtype.
            scale: what `x` is multiplied with before the cast; a number, or a tensor that
                broadcasts to the shape of `x`.
            dtype: what it is cast to, e.g. `torch.float8_e4m3fn` or `torch.float16`.

        Raises:
            ValueError: if `dtype` is not a floating-point format known here, or `scale` does not
                broadcast.
        """
        format = format_of_dtype(dtype)
        scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
        if scale.numel() == 1:
            self.sums += operand_statistics(x.reshape(1, -1), scale.reshape(()), format)
            return
        try:
            scale = scale.expand(x.shape)
        except RuntimeError as error:
            raise ValueError(
                f"scale must broadcast to the shape of x, {tuple(x.shape)}, got"
                f" {tuple(scale.shape)}; give it as many dimensions as x, 1 where it is shared"
            ) from error
        self.sums += operand_statistics(x.reshape(-1, 1), scale.reshape(-1, 1), format)

    def compute(self) -> Tensor:
        """The share over all updates and ranks; float64 scalar."""
        return shares(self.sums)[self.share]


class ClampFraction(CastMetric):
    """Elements that the clamp changes more than rounding would, over all elements.

    >>> metric = ClampFraction()
    >>> metric.update(torch.tensor([1.0, 2.0, 460.0, 500.0]), 1.0, torch.float8_e4m3fn)
    >>> metric.compute().item()  # 460 is above the largest value, 448, and rounds to it
    0.25
    """

    share = "clamped_fraction"


class ClampedMass(CastMetric):
    """What the clamp cuts off, over the sum of all magnitudes.

    >>> metric = ClampedMass()
    >>> metric.update(torch.tensor([200.0, -300.0, 500.0]), 1.0, torch.float8_e4m3fn)
    >>> metric.compute().item()  # 52 of 1000
    0.052
    """

    share = "clamped_mass"


class UnderflowFraction(CastMetric):
    """Elements that are not zero and become zero, over the elements that are not zero.

    >>> metric = UnderflowFraction()
    >>> metric.update(torch.tensor([0.0, 1.0, 1e-4]), 1.0, torch.float8_e4m3fn)
    >>> metric.compute().item()
    0.5
    """

    share = "underflow_fraction"


class SQNR(CastMetric):
    """Signal to quantization noise ratio in decibels: squares of the values over squares of errors.

    inf where the cast loses nothing, NaN where there is no value but zero.

    >>> metric = SQNR()
    >>> metric.update(torch.tensor([1.0, 1.03]), 1.0, torch.float8_e4m3fn)
    >>> round(metric.compute().item(), 1)
    33.6
    """

    higher_is_better = True
    plot_lower_bound = None
    plot_upper_bound = None
    share = "sqnr_db"
