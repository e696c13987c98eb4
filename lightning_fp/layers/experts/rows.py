"""ExpertsRow: a row of the table that multiplies for one expert, or for all of a module."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lightning_fp.kernels import HighPrecisionKernel, Kernel, KernelMemory
from lightning_fp.kernels.base import compute_dtype
from lightning_fp.kernels.gathered_casts import KeptCasts
from lightning_fp.kernels.grouped.groups import Groups
from lightning_fp.layers.experts.group_casts import GroupCasts
from lightning_fp.layers.format import LinearFormat
from lightning_fp.layers.observe import OperandStatistics, observe

NAME = "{module}[{expert}]"
"""What one expert is called."""


class ExpertsRow:
    """Format, kernel and statistics of the experts that share them."""

    fqn: str
    format: LinearFormat
    kernel: Kernel

    collect: bool
    record: bool
    memory: KernelMemory | None
    """See `SwitchableLayer`, as of these three; nothing is kept of experts between calls."""

    statistics: OperandStatistics | None
    """Where statistics go while they are collected; kept by `StatisticsTable`."""

    keeps_history: bool = False
    """Experts see other tokens at each step, and some see none: no scale of earlier steps fits."""

    def multiply_groups(
        self,
        input: Tensor,
        weight: Tensor,
        groups: Groups,
        *,
        evaluating: bool,
        gathered: KeptCasts | None,
    ) -> Tensor:
        """The products in this row's format, observed.

        Args:
            input: [rows, in_features], sorted by expert.
            weight: [experts, out_features, in_features].
            groups: whose the rows are.
            evaluating: whether this is an evaluation, which is not observed.
            gathered: what is kept of the casts of a weight that FSDP2 has gathered.

        Returns:
            [rows, out_features].
        """
        # Code compiled for one block would not serve the next if the layer's name were in it.
        name = "in compiled code" if torch.compiler.is_compiling() else self.fqn
        input = input.to(compute_dtype(input))
        output = self.kernel.multiply_groups(input, weight, groups, name, gathered)
        if not self.collect or evaluating or self.statistics is None:
            return output
        self.statistics = there = self.statistics.on(input.device)
        casts = GroupCasts(self.kernel, groups)
        flat = weight.reshape(-1, weight.shape[2])
        return observe(output, input, flat, casts, None, there, groups)

    def is_plain(self, dtype: torch.dtype | None) -> bool:
        """Whether nothing is multiplied otherwise than without this package.

        Args:
            dtype: in which the products would be; None: in whatever operands have.
        """
        kernel = self.kernel
        return isinstance(kernel, HighPrecisionKernel) and kernel.dtype in (None, dtype)


def without_history(format: LinearFormat) -> LinearFormat:
    """The same format with scales of the moment, for rows that keep no history."""
    if format.scaling != "delayed":
        return format
    return dataclasses.replace(format, scaling="dynamic")
