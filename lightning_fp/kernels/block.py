"""FP8 with one scale per block, emulated: `fp8-block` on 128 values, `mxfp8` on 32.

Scales lie along the dimension that a product sums over, and the three products of a layer sum over
three dimensions. So input and grad_output are cast twice, each time from high precision: along
their features, and along the tokens for the gradient of the weight, as Transformer Engine does
(DeepSeek-V3 casts the input again from its first cast, which rounds twice). Kept for backward are
the input's cast along the tokens, with its scales 1.03 bytes per element (1.13 for blocks of 32),
and the parameter itself.

What is exact: every product of two FP8 values; and a value times the reciprocal of its scale, if
scales are powers of two. Scales of any factor round that value once to float32, less than the sum
over the values does. Hardware undoes the scales after each block, here they are undone before one
float32 (or exact bf16) product over all blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fp.kernels.base import Kernel, compute_dtype, without_autocast
from lightning_fp.kernels.derivatives import (
    gradients_again,
    in_place_of,
    place_of,
    refuse_transforms,
)
from lightning_fp.kernels.gemm import emulated_product, operand_dtype, widen
from lightning_fp.kernels.memory import WEIGHT
from lightning_fp.kernels.plain_linear import differentiated_again
from lightning_fp.numerics import (
    FORMATS,
    Block,
    FloatFormat,
    amax_to_e8m0,
    amax_to_scale,
    block_amax,
    spread_blocks,
    through_bf16,
    times_blocks,
)
from lightning_fp.numerics.bits import to_codes
from lightning_fp.numerics.devices import has_dtype

Scales = Literal["any", "power_of_two", "e8m0"]

BLOCK = 128
"""Values that share a scale in `fp8-block` (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)."""

MX_BLOCK = 32
"""Values that share a scale in MX formats (OCP Microscaling specification v1.0)."""


@dataclass(frozen=True, kw_only=True)
class BlockKernel(Kernel):
    """Dynamic scales, each made for its own block: nothing is ever clamped."""

    input: FloatFormat = FORMATS["e4m3"]
    """8-bit format of the input."""

    weight: FloatFormat = FORMATS["e4m3"]
    """8-bit format of the weight."""

    grad_output: FloatFormat = FORMATS["e4m3"]
    """8-bit format of the gradient of the output."""

    length: int = BLOCK
    """Values along the summed dimension that share a scale; a power of two."""

    square_weight: bool = True
    """Whether the weight's blocks are square: one cast then serves output and grad_input alike."""

    scales: Scales = "any"
    """Which factors a scale may be: any float32, powers of two, or those that E8M0 can store."""

    high_grad_weight: bool = False
    """Whether the weight's gradient is computed in high precision (and the input kept in it)."""

    through_bf16: bool = False
    """Whether weights are rounded to bf16 before they are cast, as an engine receives them."""

    def __post_init__(self) -> None:
        if self.length.bit_count() != 1:
            raise ValueError(
                f"length must be a power of two, got {self.length}; take {BLOCK} or {MX_BLOCK}"
            )

    @property
    def name(self) -> str:
        """See `Kernel.name`."""
        return "native (emulated)"

    @property
    def runs_on_fp8_hardware(self) -> bool:
        """See `Kernel.runs_on_fp8_hardware`."""
        return False

    @property
    def by_row(self) -> Block:
        """The block of an operand whose rows are summed over."""
        return 1, self.length

    @property
    def by_column(self) -> Block:
        """The block of an operand whose columns are summed over."""
        return self.length, 1

    @property
    def weight_block(self) -> Block:
        """The weight's block in the forward product."""
        return (self.length, self.length) if self.square_weight else self.by_row

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, layer: str) -> Tensor:
        """See `Kernel.__call__`."""
        if input.numel() == 0 or weight.numel() == 0:
            return F.linear(input, weight, bias)
        input = input.to(compute_dtype(input))
        with without_autocast(input.device.type):
            rows = input.reshape(-1, input.shape[-1])
            output: Tensor = _BlockLinear.apply(rows, place_of(rows, weight), weight, self, layer)
            output = output.reshape(*input.shape[:-1], weight.shape[0])
            return output if bias is None else output + bias.to(output.dtype)

    def cast_of(self, operand: int, x: Tensor, scales: Tensor | None) -> tuple[Tensor, FloatFormat]:
        """See `Kernel.cast_of`; one scale per element, those of the cast along the features."""
        format = (self.input, self.weight, self.grad_output)[operand]
        block = self.weight_block if operand == WEIGHT else self.by_row
        x = self.exported(x) if operand == WEIGHT else x
        return spread_blocks(self.scale(x, block, format), block, x.shape), format

    def exported(self, weight: Tensor) -> Tensor:
        """See `Kernel.exported`."""
        return through_bf16(weight) if self.through_bf16 else weight

    def scale(self, x: Tensor, block: Block, format: FloatFormat) -> Tensor:
        """The scale of each block; float32 [row blocks, column blocks]."""
        amax = block_amax(x, block)
        if self.scales == "e8m0":
            return amax_to_e8m0(amax, format.max)
        return amax_to_scale(amax, format.max, power_of_two=self.scales == "power_of_two")

    def product_dtype(self, input: Tensor) -> torch.dtype:
        """The dtype that holds the operands, scales undone, and is multiplied in."""
        return torch.float32 if self.scales == "any" else operand_dtype(input)


class _BlockLinear(torch.autograd.Function):
    """`input [M, K] @ weight [N, K].T -> [M, N]`, each operand of each product cast in blocks."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        place: Tensor | None,
        weight: Tensor,
        kernel: BlockKernel,
        layer: str,
    ) -> Tensor:
        wide = kernel.product_dtype(input)
        cast_from = kernel.exported(weight)
        scale_w = kernel.scale(cast_from, kernel.weight_block, kernel.weight)
        w = _rounded(cast_from, scale_w, kernel.weight_block, kernel.weight, wide)
        del cast_from
        scale_x = kernel.scale(input, kernel.by_row, kernel.input)
        x = _rounded(input, scale_x, kernel.by_row, kernel.input, wide)

        needs_input, _, needs_weight = ctx.needs_input_grad[:3]
        saved_input = scale_saved = None
        if needs_weight and kernel.high_grad_weight:
            saved_input = input
        elif needs_weight:
            scale_saved = kernel.scale(input, kernel.by_column, kernel.input)
            saved_input = _cast(input, scale_saved, kernel.by_column, kernel.input)
        ctx.save_for_backward(
            saved_input,
            scale_saved,
            weight if needs_input else None,
            scale_w if kernel.square_weight else None,
        )
        ctx.kernel, ctx.wide, ctx.place, ctx.layer = kernel, wide, place, layer
        ctx.dtypes = input.dtype, weight.dtype
        return (x @ w.t()).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        saved_input, scale_x, weight, scale_w = ctx.saved_tensors
        refuse_transforms(ctx.layer, grad_output)
        kernel: BlockKernel = ctx.kernel
        wide, (input_dtype, weight_dtype) = ctx.wide, ctx.dtypes
        grad_input: Tensor | None = None
        grad_weight: Tensor | None = None
        x = saved_input
        with torch.no_grad(), without_autocast(grad_output.device.type):
            if weight is not None:
                block = kernel.weight_block if kernel.square_weight else kernel.by_column
                cast_from = kernel.exported(weight)
                if scale_w is None:
                    scale_w = kernel.scale(cast_from, block, kernel.weight)
                w = _rounded(cast_from, scale_w, block, kernel.weight, wide)
                del cast_from
                g = kernel.scale(grad_output, kernel.by_row, kernel.grad_output)
                g = _rounded(grad_output, g, kernel.by_row, kernel.grad_output, wide)
                grad_input = (g @ w).to(input_dtype)
                del w
            if saved_input is not None and kernel.high_grad_weight:
                grad_weight = (grad_output.t() @ saved_input).to(weight_dtype)
            elif saved_input is not None:
                x = _dequantised(saved_input, scale_x, kernel.by_column, kernel.input, wide)
                g = kernel.scale(grad_output, kernel.by_column, kernel.grad_output)
                g = _rounded(grad_output, g, kernel.by_column, kernel.grad_output, wide)
                grad_weight = emulated_product(g.t(), x, weight_dtype).to(weight_dtype)
        if differentiated_again():
            if x is not None and not kernel.high_grad_weight:
                x = in_place_of(x.to(input_dtype), ctx.place)
            grad_input, grad_weight = gradients_again(
                grad_input, grad_weight, grad_output, x, weight
            )
        return grad_input, None, grad_weight, None, None


def _cast(x: Tensor, scale: Tensor, block: Block, format: FloatFormat) -> Tensor:
    """Each value times its block's scale, cast, as `cast_operand` does.

    Only rounding errors of a scale are clamped.
    """
    scaled = times_blocks(x, scale, block)
    limit = format.max
    compiling = torch.compiler.is_compiling()
    clamped = scaled.clamp(-limit, limit) if compiling else scaled.clamp_(-limit, limit)
    return clamped.to(format.dtype) if has_dtype(format, x.device) else to_codes(clamped, format)


def _dequantised(
    cast: Tensor, scale: Tensor, block: Block, format: FloatFormat, wide: torch.dtype
) -> Tensor:
    """The values that a cast stands for; NaN where the scale is."""
    return times_blocks(widen(cast, format, torch.float32), scale.reciprocal(), block).to(wide)


def _rounded(
    x: Tensor, scale: Tensor, block: Block, format: FloatFormat, wide: torch.dtype
) -> Tensor:
    """What an operand is after its cast."""
    return _dequantised(_cast(x, scale, block, format), scale, block, format, wide)
