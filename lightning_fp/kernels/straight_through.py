"""Casts under torch.func (grad, vmap, jvp) and in forward mode: straight through, at any order.

There a product in FP8 has no rule. So its operands are cast as the kernel casts them, and what they
are after that is multiplied in float32, by functions that have all rules. Each sample under vmap
has a scale of its own. Blocks and rows are those along the features, in all three products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fp.kernels.base import Kernel, compute_dtype, without_autocast
from lightning_fp.kernels.memory import GRAD_OUTPUT, INPUT, WEIGHT
from lightning_fp.kernels.plain_linear import linear_without_autocast
from lightning_fp.numerics.bits import round_bits
from lightning_fp.numerics.devices import has_dtype


def straight_through(kernel: Kernel, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of a kernel that knows no transforms.

    Args:
        kernel: says how the operands are cast.
        input: [..., in_features].
        weight: [out_features, in_features].
        bias: [out_features] or None.

    Returns:
        [..., out_features], in the dtype that the kernel returns.
    """
    if input.numel() == 0 or weight.numel() == 0:
        return F.linear(input, weight, bias)
    dtype = compute_dtype(input)
    with without_autocast(input.device.type):
        rows = input.to(dtype).reshape(-1, input.shape[-1])
        x = _Cast.apply(rows, kernel, INPUT)
        w = _Cast.apply(weight, kernel, WEIGHT)
        output = linear_without_autocast(x, w).to(dtype)
        output = _CastGradient.apply(output, kernel)
        output = output.reshape(*input.shape[:-1], weight.shape[0])
        return output if bias is None else output + bias.to(dtype)


class _Cast(torch.autograd.Function):
    """float32: what an operand is after its cast."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, kernel: Kernel, operand: int) -> Tensor:
        # No scales: a history would not follow, since nothing is recorded.
        scale, format = kernel.cast_of(operand, x, None)
        cast_from = kernel.exported(x) if operand == WEIGHT else x
        scaled = (cast_from.float() * scale).clamp(-format.max, format.max)
        own = has_dtype(format, x.device)
        cast = scaled.to(format.dtype).float() if own else round_bits(scaled, format)
        return torch.where(torch.isfinite(x), cast / scale, x.float())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return grad.to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # pyright: ignore
        return tangent.float()


class _CastGradient(torch.autograd.Function):
    """Identity; the gradient is cast on its way back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, kernel: Kernel) -> Tensor:
        return output.clone()  # a view made in here could not be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.kernel = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        cast: Tensor = _Cast.apply(grad, ctx.kernel, GRAD_OUTPUT)
        return cast.to(grad.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # pyright: ignore
        return tangent.clone()
