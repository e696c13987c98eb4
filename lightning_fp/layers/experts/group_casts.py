"""GroupCasts: how a kernel casts the operands of many experts, each by itself, for statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fp.format_names import Rounding
from lightning_fp.kernels import Kernel
from lightning_fp.kernels.grouped.groups import Groups
from lightning_fp.kernels.memory import WEIGHT
from lightning_fp.numerics import FloatFormat


@dataclass(frozen=True)
class GroupCasts:
    """A kernel's casts of rows that are of several experts."""

    kernel: Kernel
    groups: Groups

    @property
    def rounding(self) -> Rounding:
        """See `Kernel.rounding`."""
        return self.kernel.rounding

    def padding(self, tokens: int, in_features: int, out_features: int) -> int:
        """See `Kernel.padding`; zeros within groups are not counted."""
        return 0

    def cast_of(self, operand: int, x: Tensor, scales: Tensor | None) -> tuple[Tensor, FloatFormat]:
        """See `Kernel.cast_of`.

        Args:
            operand: likewise.
            x: rows of tokens; or of weights, those of all experts one below the other.
            scales: None, experts have no delayed scales.

        Returns:
            The scales, [rows, 1] or one per value, and the format.
        """
        scale, format = self.kernel.cast_of(operand, x, None)
        if scale.dim() == 2 and scale.shape[1] == 1:  # a scale per row is nobody else's
            return scale, format
        if operand == WEIGHT:
            sizes = [x.shape[0] // self.groups.experts] * self.groups.experts
        else:
            sizes = self.groups.sizes()
            sizes.append(x.shape[0] - sum(sizes))
        each = [
            _by_row(self.kernel.cast_of(operand, part, None)[0], part)
            for part in x.split(sizes)
            if part.numel()
        ]
        return (torch.cat(each) if each else scale), format


def _by_row(scale: Tensor, x: Tensor) -> Tensor:
    return scale.expand(x.shape[0], 1) if scale.numel() == 1 else scale
