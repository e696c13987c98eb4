"""Products of scaled operands in bf16, whose GEMM undoes the scales of its float32 sum.

An operand divided by its scale is no bf16 value; its rounded values are, and stay so by a power of
two. That is taken near the scale, so that what is multiplied is as large as the operand was, and
between 1 and 2 is left for the product to undo.

Kept for backward are the rounded input and the parameter, which is rounded again there, with the
scale it had.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_fp.kernels.base import without_autocast
from lightning_fp.kernels.derivatives import batched, in_place_of, place_of
from lightning_fp.kernels.gemm import backward_products, forward_products
from lightning_fp.kernels.memory import GRAD_OUTPUT, INPUT, WEIGHT
from lightning_fp.kernels.plain_linear import (
    differentiated_again,
    linear_without_autocast,
    transformed,
)


class ScaledOperand(NamedTuple):
    """What is left of an operand is `values * unscale`."""

    values: Tensor
    """bf16."""

    unscale: Tensor
    """float32 scalar between 1 and 2; NaN for an operand with inf or NaN."""

    scale: Tensor
    """float32 scalar, by which it was rounded."""


class ScalesOperands(Protocol):
    """A kernel whose rounded operands are bf16 values, but for a scale."""

    def scaled_operand(
        self, operand: int, x: Tensor, seeds: Tensor | None, scale: Tensor | None = None
    ) -> ScaledOperand:
        """An operand, rounded.

        Args:
            operand: INPUT, WEIGHT or GRAD_OUTPUT.
            x: any shape.
            seeds: what it rounds by, if by chance; see `lightning_fp.kernels.SimulatedKernel`.
            scale: of an earlier call with the same operand; None: not known.
        """
        ...

    def straight_through(
        self,
        x: Tensor,
        forward: int | None,
        backward: int | None,
        dtype: torch.dtype,
        seeds: Tensor | None,
    ) -> Tensor:
        """See `lightning_fp.kernels.SimulatedKernel`."""
        ...


def scaled_linear(
    input: Tensor, weight: Tensor, kernel: ScalesOperands, seeds: Tensor | None
) -> Tensor:
    """The product of a layer, with both its derivatives in the kernel's format.

    Args:
        input: [..., in_features], not empty.
        weight: [out_features, in_features], any dtype.
        kernel: rounds all three operands.
        seeds: handed to `kernel`.

    Returns:
        [..., out_features] in the dtype of `input`.
    """
    rows = input.reshape(-1, input.shape[-1])
    output = _ScaledLinear.apply(rows, place_of(rows, weight), weight, kernel, seeds)
    return output.reshape(*input.shape[:-1], weight.shape[0])


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        place: Tensor | None,
        weight: Tensor,
        kernel: ScalesOperands,
        seeds: Tensor | None,
    ) -> Tensor:
        needs_input, _, needs_weight = ctx.needs_input_grad[:3]
        x = kernel.scaled_operand(INPUT, input, seeds)
        w = kernel.scaled_operand(WEIGHT, weight, seeds)
        ctx.save_for_backward(
            x.values if needs_weight else None,
            x.unscale,
            weight if needs_input else None,
            w.unscale,
            w.scale,
            seeds,
        )
        ctx.kernel, ctx.place, ctx.dtypes = kernel, place, (input.dtype, weight.dtype)
        return forward_products(x.values, w.values, x.unscale, w.unscale, input.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, unscale_x, weight, unscale_w, scale_w, seeds = ctx.saved_tensors
        kernel: ScalesOperands = ctx.kernel
        with without_autocast(grad_output.device.type):
            if differentiated_again() or transformed() or batched(grad_output):
                if x is not None:
                    x = in_place_of(x.float() * unscale_x, ctx.place)
                gradients = _in_float32(grad_output, x, weight, kernel, seeds, ctx.dtypes)
            else:
                w = None
                if weight is not None:
                    w = kernel.scaled_operand(WEIGHT, weight, seeds, scale_w).values
                g = kernel.scaled_operand(GRAD_OUTPUT, grad_output, seeds)
                unscales = g.unscale, unscale_x, unscale_w
                gradients = backward_products(g.values, g.values, x, w, *unscales, ctx.dtypes)
        return gradients[0], None, gradients[1], None, None


def _in_float32(
    grad_output: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    kernel: ScalesOperands,
    seeds: Tensor | None,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor | None, Tensor | None]:
    """The two products of backward, differentiable: straight through their roundings."""
    wide = torch.float32
    grad_input = grad_weight = None
    g = kernel.straight_through(grad_output, GRAD_OUTPUT, None, wide, seeds)
    if weight is not None:
        w = kernel.straight_through(weight, WEIGHT, None, wide, seeds)
        grad_input = linear_without_autocast(g, w.t()).to(dtypes[0])
    if x is not None:
        grad_weight = linear_without_autocast(g.t(), x.t()).to(dtypes[1])
    return grad_input, grad_weight
