"""Statistics of a layer's operands, gathered inside the layer, whatever multiplies it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_fp.kernels import Kernel
from lightning_fp.kernels.base import compute_dtype, without_autocast
from lightning_fp.kernels.memory import GRAD_OUTPUT, INPUT, WEIGHT, OperandRecord, in_slot
from lightning_fp.numerics import (
    STATISTICS,
    FloatFormat,
    operand_statistics,
    output_statistics,
    round_in_range,
    sampled_rows,
    what_if_statistics,
)

_Casts: TypeAlias = tuple[Tensor, Tensor, Tensor]

ROWS = ("input", "weight", "output")
"""What forward records, in order; grad_output's statistics come from backward."""


@dataclass
class Sampling:
    """Which rows SQNR and the error split are computed on; shared by all layers."""

    stride: int
    """Distance between sampled rows."""

    offset: Tensor
    """int64 scalar: the first one. It rotates, since a fixed one reads a periodic outlier
    `stride` times too high or not at all."""

    what_if: bool = False
    """Whether to compute what other scalings would have done."""


class OperandStatistics(OperandRecord):
    """Full statistics of one layer's operands since they were last taken.

    Args:
        sampling: which rows to sample.
    """

    def __init__(self, sampling: Sampling) -> None:
        super().__init__(len(ROWS), len(STATISTICS), sampling.offset.device)
        self.sampling = sampling


def observe(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    kernel: Kernel,
    scales: Tensor | None,
    statistics: OperandStatistics,
) -> Tensor:
    """Record one call of a layer.

    Args:
        output: [..., out_features], what the kernel returned.
        input: [..., in_features], what it was given.
        weight: [out_features, in_features].
        kernel: the kernel, which knows how it casts.
        scales: the layer's delayed scales, if it has any.
        statistics: where the rows go.

    Returns:
        `output`, through an identity whose backward records grad_output.
    """
    if input.numel() == 0:
        return output
    sampling = statistics.sampling
    with torch.no_grad(), without_autocast(input.device.type):
        x = input.to(compute_dtype(input)).reshape(-1, input.shape[-1])
        rows = sampled_rows(x.shape[0], sampling.stride, sampling.offset)
        features = sampled_rows(weight.shape[0], sampling.stride, sampling.offset)
        scale_x, format_x = kernel.cast_of(INPUT, x, scales)
        scale_w, format_w = kernel.cast_of(WEIGHT, weight, scales)
        if sampling.what_if:
            what_if_x = what_if_statistics(x, format_x, _history_scale(scales, INPUT), rows)
            what_if_w = what_if_statistics(
                weight, format_w, _history_scale(scales, WEIGHT), features
            )
        else:
            what_if_x = what_if_w = None
        statistics.record(
            operand_statistics(x, scale_x, format_x, rows, what_if_x),
            operand_statistics(weight, scale_w, format_w, features, what_if_w),
            _output_row(
                _casts(x, scale_x, format_x, rows), _casts(weight, scale_w, format_w, features)
            ),
        )
    if not (torch.is_grad_enabled() and output.requires_grad):
        return output
    leaf, slot = statistics.grad_leaf, statistics.next_slot()
    return _ObserveGradient.apply(output, leaf, slot, kernel, scales, sampling)


def _history_scale(scales: Tensor | None, operand: int) -> Tensor | None:
    return None if scales is None else scales[operand]


def _casts(x: Tensor, scale: Tensor, format: FloatFormat, rows: Tensor) -> _Casts:
    """Some rows of an operand: as they are, clamped, and clamped and rounded."""
    x = x.index_select(0, rows).float()
    scale = torch.nan_to_num(scale.index_select(0, rows) if scale.numel() > 1 else scale, nan=1.0)
    inside = (x * scale).clamp(-format.max, format.max)
    return x, inside / scale, round_in_range(inside, format) / scale


def _output_row(inputs: _Casts, weights: _Casts) -> Tensor:
    """The output's error, on the sampled rows of the input and the sampled features."""
    exact, clamped, cast = (x @ weight.t() for x, weight in zip(inputs, weights, strict=True))
    return output_statistics(exact, clamped, cast)


class _ObserveGradient(torch.autograd.Function):
    """Identity; backward returns grad_output's statistics as the gradient of a leaf."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        leaf: Tensor,
        slot: int,
        kernel: Kernel,
        scales: Tensor | None,
        sampling: Sampling,
    ) -> Tensor:
        ctx.save_for_backward(scales, sampling.offset)
        ctx.slot, ctx.kernel = slot, kernel
        ctx.stride, ctx.what_if = sampling.stride, sampling.what_if
        # A view made in here could not be changed in place, as nn.ReLU(inplace=True) does.
        return output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scales, offset = ctx.saved_tensors
        with without_autocast(grad_output.device.type):
            g = grad_output.reshape(-1, grad_output.shape[-1])
            scale, format = ctx.kernel.cast_of(GRAD_OUTPUT, g, scales)
            rows = sampled_rows(g.shape[0], ctx.stride, offset)
            what_if = None
            if ctx.what_if:
                what_if = what_if_statistics(g, format, _history_scale(scales, GRAD_OUTPUT), rows)
            row = operand_statistics(g, scale, format, rows, what_if)
        return grad_output, in_slot(row, ctx.slot), None, None, None, None
