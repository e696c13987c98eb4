"""The three products of a layer whose operands are cast in blocks.

Hopper's tensor cores multiply them with the scales undone after each block, by torch's own
`F.scaled_mm`. Everywhere else the values that the casts stand for are multiplied: before one
float32 (or exact bf16) product over all blocks the scales are undone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from lightning_fp.kernels.gemm import emulated_product, widen
from lightning_fp.kernels.padding import whole
from lightning_fp.numerics import Block, FloatFormat, times_blocks
from lightning_fp.numerics.bits import to_codes
from lightning_fp.numerics.devices import has_dtype

SCALES = 4
"""Hopper reads scales 16 bytes at a time: of an operand as many along the outer dimension as are a
multiple of this, of a weight's square blocks along the summed one (CUDA's documentation of
cublasLtMatmul, "1D and 2D block scaling")."""

_RESULTS = torch.bfloat16, torch.float32
"""What cuBLASLt returns of products of blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCast:
    """An operand cast in blocks."""

    values: Tensor
    """[rows, columns], FP8; its bytes where the device lacks the dtype."""

    scale: Tensor
    """float32 [row blocks, column blocks]: what the values were multiplied by before the cast."""

    block: Block
    """Rows and columns that share a scale."""

    format: FloatFormat

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The values that the cast stands for; NaN where the scale is."""
        values = widen(self.values, self.format, torch.float32)
        return times_blocks(values, self.scale.reciprocal(), self.block).to(dtype)


def cast_in_blocks(x: Tensor, scale: Tensor, block: Block, format: FloatFormat) -> BlockCast:
    """Each value times its block's scale, cast.

    Only rounding errors of a scale are clamped.

    Args:
        x: [rows, columns], high precision.
        scale: float32, one per block.
        block: its rows and columns.
        format: the 8-bit format.
    """
    scaled = times_blocks(x, scale, block)
    limit = format.max
    compiling = torch.compiler.is_compiling()
    clamped = scaled.clamp(-limit, limit) if compiling else scaled.clamp_(-limit, limit)
    low = clamped.to(format.dtype) if has_dtype(format, x.device) else to_codes(clamped, format)
    return BlockCast(values=low, scale=scale, block=block, format=format)


def output(x: BlockCast, w: BlockCast, dtype: torch.dtype, wide: torch.dtype | None) -> Tensor:
    """The product of a layer's forward.

    Args:
        x: [tokens, in_features], blocks along the features.
        w: [out_features, in_features], square blocks on tensor cores.
        dtype: of the output.
        wide: the dtype to multiply in under emulation; None on tensor cores.

    Returns:
        [tokens, out_features].
    """
    if wide is None:
        return _on_tensor_cores(x.values, x.scale, w.values, w.scale, dtype, square=True)
    return (x.dequantised(wide) @ w.dequantised(wide).t()).to(dtype)


def grad_input(g: BlockCast, w: BlockCast, dtype: torch.dtype, wide: torch.dtype | None) -> Tensor:
    """The gradient of the input.

    Args:
        g: [tokens, out_features], blocks along the features.
        w: [out_features, in_features].
        dtype: of the gradient.
        wide: as `output`.

    Returns:
        [tokens, in_features].
    """
    if wide is None:
        by_column = w.values.t(), w.scale.t()
        return _on_tensor_cores(g.values, g.scale, *by_column, dtype, square=True)
    return (g.dequantised(wide) @ w.dequantised(wide)).to(dtype)


def grad_weight(g: BlockCast, x: BlockCast, dtype: torch.dtype, wide: torch.dtype | None) -> Tensor:
    """The gradient of the weight.

    Args:
        g: [tokens, out_features], blocks along the tokens.
        x: [tokens, in_features], likewise.
        dtype: of the gradient.
        wide: as `output`.

    Returns:
        [out_features, in_features].
    """
    if wide is None:
        by_column = g.values.t(), g.scale.t(), x.values.t(), x.scale.t()
        return _on_tensor_cores(*by_column, dtype, square=False)
    # The input's values first, as they are kept until the gradient's are made.
    values = x.dequantised(wide)
    return emulated_product(g.dequantised(wide).t(), values, dtype).to(dtype)


def _on_tensor_cores(
    a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype, *, square: bool
) -> Tensor:
    """`a @ b.T` by cuBLASLt, on Hopper.

    Args:
        a: FP8 [M, K].
        scale_a: float32 [M, K / 128].
        b: FP8 [N, K].
        scale_b: float32 [N / 128, K / 128] of square blocks, else [N, K / 128].
        dtype: of the result.
        square: whether `b` has square blocks.

    Returns:
        [M, N]; zeros stand where K is no whole number of blocks, and after the last row.
    """
    rows = a.shape[0]
    a, b = whole(a, rows=SCALES, columns=128), whole(b, columns=128)
    unscale_a = whole(scale_a.reciprocal().t(), columns=SCALES).t()
    if square:
        recipe_b = ScalingType.BlockWise128x128
        unscale_b = whole(scale_b.reciprocal(), columns=SCALES).t()
    else:
        recipe_b = ScalingType.BlockWise1x128
        unscale_b = whole(scale_b.reciprocal().t()).t()
    product = F.scaled_mm(
        a,
        b.t(),
        unscale_a,
        ScalingType.BlockWise1x128,
        unscale_b,
        recipe_b,
        output_dtype=dtype if dtype in _RESULTS else torch.float32,
    )
    return product.narrow(0, 0, rows).to(dtype)
