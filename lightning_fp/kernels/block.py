"""FP8 with one scale per block: `fp8-block` on 128 values, `mxfp8` (emulated) on 32.

Scales lie along the dimension that a product sums over, and the three products of a layer sum over
three dimensions. So input and grad_output are cast twice, each time from high precision: along
their features, and along the tokens for the gradient of the weight, as Transformer Engine does
(DeepSeek-V3 casts the input again from its first cast, which rounds twice). Kept for backward are
the input's cast along the tokens, with its scales 1.03 bytes per element (1.13 for blocks of 32),
and the parameter itself.

What is exact: every product of two FP8 values; and a value times the reciprocal of its scale, if
scales are powers of two. Scales of any factor round that value once to float32, less than the sum
over the values does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fp.kernels.base import Kernel, compute_dtype, without_autocast
from lightning_fp.kernels.block_products import (
    SCALES,
    BlockCast,
    cast_in_blocks,
    grad_input,
    grad_weight,
    output,
)
from lightning_fp.kernels.derivatives import (
    gradients_again,
    in_place_of,
    place_of,
    refuse_transforms,
)
from lightning_fp.kernels.gathered_casts import KeptCasts, identity
from lightning_fp.kernels.gemm import operand_dtype
from lightning_fp.kernels.hardware import check_alignment
from lightning_fp.kernels.memory import WEIGHT
from lightning_fp.kernels.padding import zeros_to
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
)

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

    cuda_fp8: bool = False
    """Whether CUDA tensors go to Hopper's tensor cores; everything else is emulated."""

    def __post_init__(self) -> None:
        if self.length.bit_count() != 1:
            raise ValueError(
                f"length must be a power of two, got {self.length}; take {BLOCK} or {MX_BLOCK}"
            )
        if self.cuda_fp8 and not (self.length == BLOCK and self.square_weight):
            raise ValueError(
                f"cuda_fp8 must be False for blocks of {self.length}, got True: tensor cores take"
                f" {BLOCK} values, and {BLOCK} by {BLOCK} of a weight"
            )

    @property
    def name(self) -> str:
        """See `Kernel.name`."""
        return "native" if self.cuda_fp8 else "native (emulated)"

    @property
    def runs_on_fp8_hardware(self) -> bool:
        """See `Kernel.runs_on_fp8_hardware`."""
        return self.cuda_fp8

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

    def multiply(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: str,
        memory: Any = None,
        *,
        gathered: KeptCasts | None = None,
        **ignored: Any,
    ) -> Tensor:
        """See `Kernel.multiply`."""
        if input.numel() == 0 or weight.numel() == 0:
            return F.linear(input, weight, bias)
        input = input.to(compute_dtype(input))
        if not self.emulates(input):
            out_features, in_features = weight.shape
            check_alignment(
                layer, in_features=in_features, out_features=out_features, multiple=BLOCK
            )
        with without_autocast(input.device.type):
            rows = input.reshape(-1, input.shape[-1])
            how = self, layer, gathered
            result: Tensor = _BlockLinear.apply(rows, place_of(rows, weight), weight, *how)
            result = result.reshape(*input.shape[:-1], weight.shape[0])
            return result if bias is None else result + bias.to(result.dtype)

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

    def cast(self, x: Tensor, block: Block, format: FloatFormat) -> BlockCast:
        """An operand of one product."""
        return cast_in_blocks(x, self.scale(x, block, format), block, format)

    def cast_weight(self, weight: Tensor, block: Block, scale: Tensor | None = None) -> BlockCast:
        """The weight of one product, as it is exported; with the scales of its forward, if kept."""
        x = self.exported(weight)
        scale = self.scale(x, block, self.weight) if scale is None else scale
        return cast_in_blocks(x, scale, block, self.weight)

    def cast_once(
        self,
        weight: Tensor,
        block: Block,
        gathered: KeptCasts | None,
        scale: Tensor | None = None,
    ) -> BlockCast:
        """`cast_weight`; of a weight that FSDP2 has gathered only where it was not cast before."""
        if gathered is None:
            return self.cast_weight(weight, block, scale)
        kept = gathered.of(
            weight,
            (self, block),
            lambda: self.cast_weight(weight, block, scale),
            lambda cast: (cast.values,) if self.square_weight else (cast.values, cast.scale),
        )
        same = scale is None or identity(scale) == identity(kept.scale)
        return kept if same else self.cast_weight(weight, block, scale)

    def product_dtype(self, input: Tensor) -> torch.dtype | None:
        """The dtype that holds the operands, scales undone, and is multiplied in.

        None where tensor cores multiply the casts.
        """
        if not self.emulates(input):
            return None
        return torch.float32 if self.scales == "any" else operand_dtype(input)

    def emulates(self, input: Tensor) -> bool:
        """Whether the products with this input are emulated."""
        return not (self.cuda_fp8 and input.is_cuda)

    def padding(self, tokens: int, in_features: int, out_features: int) -> int:
        """See `Kernel.padding`; the weight's gradient sums over whole blocks of tokens."""
        if not self.cuda_fp8:
            return 0
        rows = 2 * zeros_to(SCALES, tokens)
        summed = 0 if self.high_grad_weight else zeros_to(self.length, tokens)
        return 2 * (rows + summed) * in_features * out_features


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
        gathered: KeptCasts | None,
    ) -> Tensor:
        wide = kernel.product_dtype(input)
        w = kernel.cast_once(weight, kernel.weight_block, gathered)
        x = kernel.cast(input, kernel.by_row, kernel.input)
        needs_input, _, needs_weight = ctx.needs_input_grad[:3]
        saved_input = scale_saved = None
        if needs_weight and kernel.high_grad_weight:
            saved_input = input
        elif needs_weight:
            by_column = kernel.cast(input, kernel.by_column, kernel.input)
            saved_input, scale_saved = by_column.values, by_column.scale
        ctx.save_for_backward(
            saved_input,
            scale_saved,
            weight if needs_input else None,
            w.scale if kernel.square_weight else None,
        )
        ctx.kernel, ctx.wide, ctx.place, ctx.layer = kernel, wide, place, layer
        ctx.dtypes, ctx.gathered = (input.dtype, weight.dtype), gathered
        return output(x, w, input.dtype, wide)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        saved_input, scale_x, weight, scale_w = ctx.saved_tensors
        refuse_transforms(ctx.layer, grad_output)
        kernel: BlockKernel = ctx.kernel
        wide, (input_dtype, weight_dtype) = ctx.wide, ctx.dtypes
        of_input: Tensor | None = None
        of_weight: Tensor | None = None
        x = saved_input
        with torch.no_grad(), without_autocast(grad_output.device.type):
            if weight is not None:
                block = kernel.weight_block if kernel.square_weight else kernel.by_column
                w = kernel.cast_once(weight, block, ctx.gathered, scale_w)
                g = kernel.cast(grad_output, kernel.by_row, kernel.grad_output)
                of_input = grad_input(g, w, input_dtype, wide)
                del w
            if saved_input is not None and kernel.high_grad_weight:
                of_weight = (grad_output.t() @ saved_input).to(weight_dtype)
            elif saved_input is not None:
                kept = BlockCast(
                    values=saved_input, scale=scale_x, block=kernel.by_column, format=kernel.input
                )
                g = kernel.cast(grad_output, kernel.by_column, kernel.grad_output)
                of_weight = grad_weight(g, kept, weight_dtype, wide)
                x = kept
        if differentiated_again():
            if isinstance(x, BlockCast):
                x = in_place_of(x.dequantised(input_dtype), ctx.place)
            of_input, of_weight = gradients_again(of_input, of_weight, grad_output, x, weight)
        return of_input, None, of_weight, None, None, None
