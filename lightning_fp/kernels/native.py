"""FP8 with one dynamic scale per tensor: our own functional autograd.Function.

Keeps for backward the FP8 input (a quarter or half of what high precision keeps) and the
parameter itself. The weight is cast again in backward: under FSDP a saved cast copy would keep
the unsharded weight alive between forward and backward (pytorch/ao#1629).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lightning_fp.kernels.base import compute_dtype, without_autocast
from lightning_fp.kernels.gemm import cast_operand, multiply, operand_dtype, widen
from lightning_fp.kernels.hardware import check_alignment
from lightning_fp.numerics import FORMATS, FloatFormat, amax_to_scale, tensor_amax


@dataclass(frozen=True, kw_only=True)
class NativeKernel:
    """Dynamic per-tensor scaling: every operand is scaled by its own largest magnitude."""

    input: FloatFormat = FORMATS["e4m3"]
    """8-bit format of the input."""

    weight: FloatFormat = FORMATS["e4m3"]
    """8-bit format of the weight."""

    grad_output: FloatFormat = FORMATS["e5m2"]
    """8-bit format of the gradient of the output."""

    high_grad_weight: bool = False
    """Whether the weight's gradient is computed in high precision (and the input kept in it)."""

    cuda_fp8: bool = False
    """Whether CUDA tensors go to FP8 tensor cores; everything else is emulated."""

    @property
    def name(self) -> str:
        """See `Kernel.name`."""
        return "native" if self.cuda_fp8 else "native (emulated)"

    @property
    def runs_on_fp8_hardware(self) -> bool:
        """See `Kernel.runs_on_fp8_hardware`."""
        return self.cuda_fp8

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, layer: str) -> Tensor:
        """See `Kernel.__call__`."""
        if input.numel() == 0 or weight.numel() == 0:
            return F.linear(input, weight, bias)
        input = input.to(compute_dtype(input))
        emulate = not (self.cuda_fp8 and input.is_cuda)
        if not emulate:
            check_alignment(
                layer,
                tokens=input.numel() // input.shape[-1],
                in_features=weight.shape[1],
                out_features=weight.shape[0],
            )
        with without_autocast(input.device.type):
            rows = input.reshape(-1, input.shape[-1])
            output = _NativeLinear.apply(rows, weight, self, emulate)
            output = output.reshape(*input.shape[:-1], weight.shape[0])
            return output if bias is None else output + bias.to(output.dtype)


def _scale(x: Tensor, format: FloatFormat) -> Tensor:
    return amax_to_scale(tensor_amax(x), format.max)


class _NativeLinear(torch.autograd.Function):
    """`input [M, K] @ weight [N, K].T -> [M, N]` with FP8 operands in all three products."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, input: Tensor, weight: Tensor, kernel: NativeKernel, emulate: bool
    ) -> Tensor:
        wide = operand_dtype(input) if emulate else None
        scale_x, scale_w = _scale(input, kernel.input), _scale(weight, kernel.weight)
        x8, x = cast_operand(input, scale_x, kernel.input, wide)
        _, w = cast_operand(weight, scale_w, kernel.weight, wide)

        needs_input, needs_weight = ctx.needs_input_grad[:2]  # pyright: ignore
        saved_input = input if kernel.high_grad_weight else x8
        ctx.save_for_backward(
            saved_input if needs_weight else None,
            weight if needs_input else None,
            scale_x,
            scale_w,
        )
        ctx.kernel, ctx.wide = kernel, wide  # pyright: ignore
        ctx.dtypes = input.dtype, weight.dtype  # pyright: ignore
        return multiply(x, w.t(), scale_x, scale_w, input.dtype, fast_accumulation=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # pyright: ignore
        saved_input, weight, scale_x, scale_w = ctx.saved_tensors
        kernel, wide = ctx.kernel, ctx.wide
        input_dtype, weight_dtype = ctx.dtypes
        grad_input = grad_weight = None
        with without_autocast(grad_output.device.type):
            scale_g = _scale(grad_output, kernel.grad_output)
            _, g = cast_operand(grad_output, scale_g, kernel.grad_output, wide)
            if weight is not None:
                _, w = cast_operand(weight, scale_w, kernel.weight, wide)
                grad_input = multiply(g, w, scale_g, scale_w, input_dtype)
                del w
            if saved_input is not None and kernel.high_grad_weight:
                grad_weight = (grad_output.t() @ saved_input).to(weight_dtype)
            elif saved_input is not None:
                x = widen(saved_input, wide)
                grad_weight = multiply(g.t(), x, scale_g, scale_x, weight_dtype)
        return grad_input, grad_weight, None, None
