"""Any e{X}m{Y}: operands are rounded to the format, products are computed in float32.

No float8 dtype is involved, so this runs on every device. For studies, not for speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fp.kernels.base import Kernel, compute_dtype, without_autocast
from lightning_fp.kernels.plain_linear import (
    differentiated_again,
    linear_without_autocast,
    transformed,
)
from lightning_fp.numerics import FloatFormat, Rounding, round_to_format


@dataclass(frozen=True, kw_only=True)
class SimulatedKernel(Kernel):
    """Rounds input, weight and grad_output, each to its format; no scaling."""

    every_derivative = True

    input: FloatFormat
    """Format of the input, e.g. e8m3."""

    weight: FloatFormat
    """Format of the weight."""

    grad_output: FloatFormat
    """Format of the gradient of the output."""

    rounding: Rounding = "nearest"
    """How values between two representable ones are rounded."""

    @property
    def name(self) -> str:
        """See `Kernel.name`."""
        return "simulated"

    @property
    def runs_on_fp8_hardware(self) -> bool:
        """See `Kernel.runs_on_fp8_hardware`."""
        return False

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, layer: str) -> Tensor:
        """See `Kernel.__call__`."""
        input = input.to(compute_dtype(input))
        with without_autocast(input.device.type):
            x = _rounded(input, self.input, None, self.rounding)
            w = _rounded(weight, self.weight, None, self.rounding)
            output = linear_without_autocast(x, w)
            output = _rounded(output, None, self.grad_output, self.rounding).to(input.dtype)
            return output if bias is None else output + bias.to(output.dtype)

    def cast_of(self, operand: int, x: Tensor, scales: Tensor | None) -> tuple[Tensor, FloatFormat]:
        """See `Kernel.cast_of`."""
        format = (self.input, self.weight, self.grad_output)[operand]
        return torch.ones((), device=x.device), format


def _rounded(
    x: Tensor, forward: FloatFormat | None, backward: FloatFormat | None, rounding: Rounding
) -> Tensor:
    """Rounded on the way forward, on the way back, or both; straight-through otherwise."""
    function = _TransformedRound if transformed() else _Round
    return function.apply(x, forward, backward, rounding)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        forward: FloatFormat | None,
        backward: FloatFormat | None,
        rounding: Rounding,
    ) -> Tensor:
        ctx.dtype, ctx.format, ctx.rounding = x.dtype, backward, rounding
        return _once(x, forward, rounding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        if ctx.format is not None:
            again = transformed() or differentiated_again()
            grad = (
                _rounded(grad, ctx.format, None, ctx.rounding)
                if again
                else round_to_format(grad, ctx.format, ctx.rounding)
            )
        return grad.to(ctx.dtype), None, None, None


class _TransformedRound(torch.autograd.Function):
    """The same for torch.func and forward mode; slower to call, and unknown to dynamo."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, forward: FloatFormat | None, backward: FloatFormat | None, rounding: Rounding
    ) -> Tensor:
        return _once(x, forward, rounding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.format, ctx.rounding = inputs
        ctx.dtype, ctx.out_dtype = x.dtype, output.dtype

    backward = staticmethod(_Round.backward)  # pyright: ignore

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # pyright: ignore
        return tangent.to(ctx.out_dtype)


def _once(x: Tensor, format: FloatFormat | None, rounding: Rounding) -> Tensor:
    if format is None:
        return x.clone()  # a view made in here could not be changed in place
    return round_to_format(x, format, rounding)
