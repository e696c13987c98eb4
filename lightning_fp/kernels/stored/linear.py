"""Products with a weight of which only the FP8 cast is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fp.kernels.base import compute_dtype, without_autocast
from lightning_fp.kernels.derivatives import gradients_again, refuse_transforms
from lightning_fp.kernels.gemm import (
    cast_operand,
    forward_products,
    multiply,
    operand_dtype,
    unscale,
    widen,
)
from lightning_fp.kernels.memory import GRAD_OUTPUT, INPUT, amax_row, for_leaf
from lightning_fp.kernels.plain_linear import (
    differentiated_again,
    linear_without_autocast,
    transformed,
)
from lightning_fp.kernels.stored.weight import StoredWeight, dequantised
from lightning_fp.numerics import tensor_amax

if TYPE_CHECKING:
    from lightning_fp.kernels.native import NativeKernel


def dequantised_linear(input: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
    """What nn.Linear computes with the weight's values, which are made anew in backward.

    Args:
        input: [..., in_features].
        weight: [out_features, in_features].
        bias: [out_features] or None.

    Returns:
        [..., out_features], in the dtype that nn.Linear returns.
    """
    if transformed():
        return F.linear(input, weight.dequantised(), bias)
    if torch.is_autocast_enabled(input.device.type):
        dtype = compute_dtype(input)
        bias = None if bias is None else bias.to(dtype)
        return linear_without_autocast(input.to(dtype), weight.to(dtype), bias)
    return linear_without_autocast(input, weight, bias)


class StoredLinear(torch.autograd.Function):
    """`_NativeLinear` of a weight that was cast once and for all, and asks for no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        w8: Tensor,
        scale_w: Tensor,
        amax_w: Tensor,
        scales: Tensor | None,
        leaf: Tensor | None,
        slot: int,
        kernel: NativeKernel,
        emulate: bool,
        in_full: bool,
        layer: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = operand_dtype(input) if emulate else None
        amax_x = tensor_amax(input)
        scale_x = kernel.scale(amax_x, scales, INPUT, kernel.input)
        _, x = cast_operand(input, scale_x, kernel.input, wide)
        unscale_w = unscale(scale_w, amax_w)
        output = forward_products(
            x, widen(w8, kernel.weight, wide), unscale(scale_x, amax_x), unscale_w, input.dtype
        )
        ctx.save_for_backward(w8, scale_w, amax_w, scales)
        ctx.kernel, ctx.wide, ctx.layer, ctx.dtype = kernel, wide, layer, input.dtype
        ctx.slot = None if leaf is None else slot
        rows = amax_row(input, amax_x, in_full), amax_row(None, amax_w, in_full)
        ctx.mark_non_differentiable(*rows)
        return output, *rows

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *row_gradients: Any) -> tuple[Tensor | None, ...]:
        w8, scale_w, amax_w, scales = ctx.saved_tensors
        refuse_transforms(ctx.layer, grad_output)
        kernel, grad_input, grad_leaf = ctx.kernel, None, None
        with torch.no_grad(), without_autocast(grad_output.device.type):
            amax_g = tensor_amax(grad_output)
            scale_g = kernel.scale(amax_g, scales, GRAD_OUTPUT, kernel.grad_output)
            if ctx.needs_input_grad[0]:
                _, g = cast_operand(grad_output, scale_g, kernel.grad_output, ctx.wide)
                scale = unscale(scale_g, amax_g), unscale(scale_w, amax_w)
                grad_input = multiply(g, widen(w8, kernel.weight, ctx.wide), *scale, ctx.dtype)
            if ctx.slot is not None:
                grad_leaf = for_leaf(ctx, amax_row(grad_output, amax_g, True))
        if differentiated_again() and grad_input is not None:
            weight = dequantised(w8, scale_w, amax_w, ctx.dtype, kernel.weight)
            grad_input, _ = gradients_again(grad_input, None, grad_output, None, weight)
        return grad_input, None, None, None, None, grad_leaf, None, None, None, None, None
