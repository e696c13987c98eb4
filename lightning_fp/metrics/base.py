"""What the metrics of this package have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torchmetrics import Metric


class Float64Metric(Metric):
    """A torchmetric whose sums stay in float64, in whatever dtype the module around it is.

    Args:
        kwargs: torchmetrics' own options, e.g. `sync_on_compute`.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> Any:
        """Follow the module to its device, but not to a smaller dtype."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device)

        return super()._apply(move, exclude_state)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """A figure of one or more values, as every torchmetric has it; needs matplotlib.

        Args:
            val: what `compute` or `forward` returned, or a list of it; by default computed now.
            ax: the matplotlib axis to draw on.

        Returns:
            The figure and its axis.
        """
        return self._plot(val, ax)
