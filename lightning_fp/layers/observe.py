"""Statistics of a layer's operands, gathered inside the layer, whatever multiplies it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_fp.format_names import Rounding
from lightning_fp.kernels.base import compute_dtype, without_autocast
from lightning_fp.kernels.block import BLOCK
from lightning_fp.kernels.grouped.groups import Groups
from lightning_fp.kernels.memory import GRAD_OUTPUT, INPUT, WEIGHT, OperandRecord, for_leaf
from lightning_fp.numerics import (
    STATISTICS,
    Casts,
    FloatFormat,
    casts_of,
    operand_statistics,
    output_statistics,
    sampled_rows,
    what_if_statistics,
)

OUTPUT_FEATURES = 16
"""The output's error is computed on as many of its features at most, evenly spaced, which rotate as
the rows do. That takes three more products in float32: of all features they would cost as much as
forward and backward of the layer. The features do not depend on the batch, so that micro-batches
and ranks add up to the whole."""

ROWS = ("input", "weight", "output")
"""What forward records, in order; grad_output's statistics come from backward."""


class KnowsCasts(Protocol):
    """What the statistics ask of a kernel, see there."""

    @property
    def rounding(self) -> Rounding:
        """How its casts round."""
        ...

    def cast_of(self, operand: int, x: Tensor, scales: Tensor | None) -> tuple[Tensor, FloatFormat]:
        """How an operand is cast."""
        ...

    def padding(self, tokens: int, in_features: int, out_features: int) -> int:
        """FLOPs that are spent on zeros."""
        ...


@dataclass
class Sampling:
    """Which rows SQNR and the error split are computed on; shared by all layers of a device."""

    stride: int
    """Distance between sampled rows."""

    offset: Tensor
    """int64 scalar: the first one. It rotates, since a fixed one reads a periodic outlier
    `stride` times too high or not at all."""

    what_if: bool = False
    """Whether to compute what other scalings would have done."""

    elsewhere: dict[torch.device, Sampling] = field(default_factory=dict, repr=False)
    """Its likes on other devices, which have these too."""

    _indices: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)
    """Those that layers of one size share, by count and stride; of this offset, in eager mode."""

    def on(self, device: torch.device) -> Sampling:
        """Itself, or its like on another device."""
        if self.offset.device == device:
            return self
        if device not in self.elsewhere:
            offset = self.offset.to(device)
            self.elsewhere[device] = Sampling(self.stride, offset, self.what_if, self.elsewhere)
        return self.elsewhere[device]

    def turn_to(self, turn: int) -> None:
        """Begin at another row, on all devices."""
        for each in (self, *self.elsewhere.values()):
            # Another tensor: a graph of an earlier step may still go backward with its own.
            each.offset, each._indices = torch.full_like(each.offset, turn), {}

    def rows(self, x: Tensor) -> Tensor | None:
        """Indices of the rows of an operand to sample; None for all."""
        return None if self.stride == 1 else self._every(self.stride, x.shape[0])

    def output_features(self, weight: Tensor, most: int = OUTPUT_FEATURES) -> Tensor:
        """Indices of the rows of the weight, which are features of the output, to sample."""
        return self._every(-(-weight.shape[0] // most), weight.shape[0])

    def _every(self, stride: int, count: int) -> Tensor:
        if torch.compiler.is_compiling():
            return sampled_rows(count, stride, self.offset)
        if (count, stride) not in self._indices:
            self._indices[count, stride] = sampled_rows(count, stride, self.offset)
        return self._indices[count, stride]


class OperandStatistics(OperandRecord):
    """Full statistics of one layer's operands since they were last taken.

    Args:
        sampling: which rows to sample.
    """

    def __init__(self, sampling: Sampling) -> None:
        super().__init__(len(ROWS), len(STATISTICS), sampling.offset.device)
        self.sampling = sampling

    def on(self, device: torch.device) -> OperandStatistics:
        """Itself, or its like on another device; what was recorded stays behind."""
        there = self.sampling.on(device)
        return self if there is self.sampling else OperandStatistics(there)


def observe(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    kernel: KnowsCasts,
    scales: Tensor | None,
    statistics: OperandStatistics,
    groups: Groups | None = None,
) -> Tensor:
    """Record one call of a layer.

    Args:
        output: [..., out_features], what the kernel returned.
        input: [..., in_features], what it was given.
        weight: [out_features, in_features]; of a mixture all experts', one below the other.
        kernel: the kernel, which knows how it casts.
        scales: the layer's delayed scales, if it has any.
        statistics: where the rows go.
        groups: whose the rows of the input are, of a mixture of experts.

    Returns:
        `output`, through an identity whose backward records grad_output.
    """
    if input.numel() == 0:
        return output
    sampling = statistics.sampling
    with torch.no_grad(), without_autocast(input.device.type):
        x = input.to(compute_dtype(input)).reshape(-1, input.shape[-1])
        rows, features = sampling.rows(x), sampling.rows(weight)
        scale_x, format_x = kernel.cast_of(INPUT, x, scales)
        scale_w, format_w = kernel.cast_of(WEIGHT, weight, scales)
        casts_x = casts_of(x, scale_x, format_x, rows, kernel.rounding)
        casts_w = casts_of(weight, scale_w, format_w, features, kernel.rounding)
        what_if_x = what_if_w = None
        if sampling.what_if and groups is None:  # they ask for one tensor of each operand
            scale_h = (None, None) if scales is None else (scales[INPUT], scales[WEIGHT])
            what_if_x = what_if_statistics(x, format_x, scale_h[0], rows)
            what_if_w = what_if_statistics(weight, format_w, scale_h[1], features, (BLOCK, BLOCK))
        experts = 1 if groups is None else groups.experts
        some = sampling.output_features(weight, OUTPUT_FEATURES * min(experts, 16))
        some_w = casts_of(weight, scale_w, format_w, some, kernel.rounding)
        own = None
        if groups is not None:
            of_row = groups.of_row if rows is None else groups.of_row.index_select(0, rows)
            own = of_row.unsqueeze(1) == some // (weight.shape[0] // experts)
        work = _work(kernel, x.shape[0], weight.shape[1], weight.shape[0] // experts)
        statistics.record(
            operand_statistics(x, scale_x, format_x, casts_x, what_if_x, work),
            operand_statistics(weight, scale_w, format_w, casts_w, what_if_w),
            _output_row(casts_x, some_w, own),
        )
    if not (torch.is_grad_enabled() and output.requires_grad):
        return output
    leaf, slot = statistics.grad_leaf, statistics.next_slot()
    return _ObserveGradient.apply(output, scales, leaf, slot, kernel, sampling)


def _work(
    kernel: KnowsCasts, tokens: int, in_features: int, out_features: int
) -> tuple[float, float]:
    """FLOPs of forward and backward, and those of the zeros that hardware wants beside."""
    flops = 3 * 2 * tokens * in_features * out_features
    return flops, kernel.padding(tokens, in_features, out_features)


def _output_row(x: Casts, weight: Casts, own: Tensor | None) -> Tensor:
    """The output's error, on the sampled rows of the input and some features.

    Args:
        x: rows of the input.
        weight: rows of the weight.
        own: bool [rows, features], whether a feature is of the row's expert; None: there is one.
    """
    if x.scale.dim() and x.scale.shape[1] > 1:  # blocks: scales are undone before the sum
        x_scale, w_scale = x.scale.reciprocal(), weight.scale.reciprocal()
        pairs = (
            (x.clamped * x_scale, weight.clamped * w_scale),
            (x.cast * x_scale, weight.cast * w_scale),
        )
        scale = None
    else:
        pairs = (x.clamped, weight.clamped), (x.cast, weight.cast)
        scale = x.scale * weight.scale.reshape(-1)

    def product(a: Tensor, b: Tensor, scale: Tensor | None) -> Tensor:
        output = a @ b.t()
        output = output if scale is None else output / scale
        return output if own is None else torch.where(own, output, 0.0)

    exact = product(x.values, weight.values, None)
    return output_statistics(exact, *(product(a, b, scale) for a, b in pairs))


class _ObserveGradient(torch.autograd.Function):
    """Identity; backward returns grad_output's statistics as the gradient of a leaf."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        scales: Tensor | None,
        leaf: Tensor,
        slot: int,
        kernel: KnowsCasts,
        sampling: Sampling,
    ) -> Tensor:
        ctx.save_for_backward(scales, sampling.offset)
        ctx.slot, ctx.kernel = slot, kernel
        ctx.stride, ctx.what_if = sampling.stride, sampling.what_if
        # A view made in here could not be changed in place, as nn.ReLU(inplace=True) does.
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scales, offset = ctx.saved_tensors
        with torch.no_grad(), without_autocast(grad_output.device.type):
            g = grad_output.reshape(-1, grad_output.shape[-1])
            scale, format = ctx.kernel.cast_of(GRAD_OUTPUT, g, scales)
            sampling = Sampling(ctx.stride, offset, ctx.what_if)
            rows, what_if = sampling.rows(g), None
            if sampling.what_if:
                scale_h = None if scales is None else scales[GRAD_OUTPUT]
                what_if = what_if_statistics(g, format, scale_h, rows)
            casts = casts_of(g, scale, format, rows, ctx.kernel.rounding)
            row = operand_statistics(g, scale, format, casts, what_if)
            grad_leaf = for_leaf(ctx, row)
        return grad_output, None, grad_leaf, None, None, None
