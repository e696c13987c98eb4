"""torchao's emulation where torch has no float8 dtype, or cannot store it in compiled code.

The same casts and the same products in float32, bit for bit, of operands whose scale is per tensor
or per row. Input and weight are kept for backward as they are, as torchao does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fp.kernels.base import without_autocast
from lightning_fp.kernels.derivatives import gradients_again, refuse_transforms
from lightning_fp.kernels.plain_linear import differentiated_again
from lightning_fp.numerics import FloatFormat, amax_to_scale, tensor_amax
from lightning_fp.numerics.bits import round_bits


@dataclass(frozen=True, kw_only=True)
class Cast:
    """How one operand of one product is cast."""

    format: FloatFormat
    by_row: bool
    """Whether what is summed over shares a scale, else the whole tensor."""
    power_of_two: bool

    def values(self, x: Tensor, summed: int) -> Tensor:
        """What an operand is after its cast; float32.

        Args:
            x: a matrix, high precision.
            summed: the dimension that the product sums over.
        """
        rows = x.detach().abs().amax(dim=summed, keepdim=True).float() if self.by_row else None
        amax = tensor_amax(x) if rows is None else rows
        scale = amax_to_scale(amax, self.format.max, power_of_two=self.power_of_two)
        scaled = (x.float() * scale).clamp(-self.format.max, self.format.max)
        return torch.where(torch.isnan(scaled), scaled, round_bits(scaled, self.format)) / scale


@dataclass(frozen=True, kw_only=True)
class Casts:
    """Those of the three products of a layer, first and second operand."""

    output: tuple[Cast, Cast]
    grad_input: tuple[Cast, Cast]
    grad_weight: tuple[Cast, Cast] | None
    """None: in high precision."""


def float8_free_linear(input: Tensor, weight: Tensor, casts: Casts, layer: str) -> Tensor:
    """The product of a layer, of operands that are cast.

    Args:
        input: [tokens, in_features].
        weight: [out_features, in_features].
        casts: of the operands.
        layer: the layer's name, for error messages.

    Returns:
        [tokens, out_features] in the dtype of `input`.
    """
    return _Linear.apply(input, weight, casts, layer)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, casts: Casts, layer: str) -> Tensor:
        needs_input, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None)
        ctx.casts, ctx.layer = casts, layer
        ctx.dtypes = input.dtype, weight.dtype
        x, w = casts.output
        return (x.values(input, 1) @ w.values(weight, 1).t()).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        refuse_transforms(ctx.layer, grad_output)
        # Checkpointing gives saved tensors out once.
        input, weight = ctx.saved_tensors
        casts: Casts = ctx.casts
        grad_input: Tensor | None = None
        grad_weight: Tensor | None = None
        with torch.no_grad(), without_autocast(grad_output.device.type):
            if weight is not None:
                g, w = casts.grad_input
                product = g.values(grad_output, 1) @ w.values(weight, 0)
                grad_input = product.to(ctx.dtypes[0])
            if input is not None and casts.grad_weight is None:
                grad_weight = (grad_output.t() @ input).to(ctx.dtypes[1])
            elif input is not None and casts.grad_weight is not None:
                g, x = casts.grad_weight
                product = g.values(grad_output, 0).t() @ x.values(input, 0)
                grad_weight = product.to(grad_output.dtype).to(ctx.dtypes[1])
        if differentiated_again():
            grad_input, grad_weight = gradients_again(
                grad_input, grad_weight, grad_output, input, weight
            )
        return grad_input, grad_weight, None, None
