"""Fused casts as functions of tensors: what the kernel of a layer calls where it runs eagerly.

Compiled code has no need of them: Inductor fuses the same passes, but for the second layout, and a
kernel that it did not write is a wall to it.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lightning_fp.format_names import ALIGNMENT
from lightning_fp.numerics import FloatFormat

SWITCH = "LIGHTNING_FP_FUSED_CASTS"
"""Environment variable: 0 turns fused casts off, everything else leaves them on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedCast:
    """One operand, cast."""

    rows: Tensor | None
    """FP8 [rows, columns]; None if it was not asked for."""

    columns: Tensor | None
    """FP8 [rows, columns], whose columns are contiguous: a view of its transpose."""

    scale: Tensor
    """float32 scalar, what it was cast with."""

    counters: Tensor
    """int32 [4], see `lightning_fp.kernels.triton.cast`."""

    @property
    def amax(self) -> Tensor:
        """float32 scalar; NaN or inf if the operand has one."""
        return self.counters[0].view(torch.float32)

    @property
    def nonfinite(self) -> Tensor:
        """int32 scalar."""
        return self.counters[1]

    @property
    def clamped(self) -> Tensor:
        """int32 scalar, where statistics were asked for."""
        return self.counters[2]

    @property
    def underflown(self) -> Tensor:
        """int32 scalar, likewise."""
        return self.counters[3]


@cache
def available() -> bool:
    """Whether fused casts may be used: Triton is installed, and they are not turned off."""
    return os.environ.get(SWITCH, "1") != "0" and find_spec("triton") is not None


def fused_cast(
    x: Tensor,
    format: FloatFormat,
    scale: Tensor | None = None,
    *,
    rows: bool = True,
    columns: bool = True,
    statistics: bool = False,
) -> FusedCast:
    """Cast an operand in one pass over it, or two where its scale has to be found first.

    Args:
        x: [rows, columns], bf16, fp16 or float32, not empty.
        format: e4m3 or e5m2.
        scale: float32 scalar; None: from the amax of `x`, as `amax_to_scale`.
        rows: whether the layout of `x` is written.
        columns: whether the other layout is.
        statistics: whether clamped and underflown values are counted.

    Returns:
        The casts with scale, amax and counts. Values are those of `scaled_cast`, bit for bit; the
        sign of a NaN is not.
    """
    kernels = _kernels()
    height, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    padded = height + -height % ALIGNMENT
    counters = torch.zeros(kernels.COUNTERS, dtype=torch.int32, device=x.device)
    found = scale is None
    if scale is None:
        x = x.contiguous()
        scale = torch.empty((), dtype=torch.float32, device=x.device)
        step = kernels.BLOCK * kernels.LOOPS
        grid = (-(-x.numel() // step),)
        kernels.amax_kernel[grid](
            x,
            counters,
            x.numel(),
            BLOCK=kernels.BLOCK,
            LOOPS=kernels.LOOPS,
            enable_fp_fusion=kernels.FP_FUSION,
        )
    nothing = counters  # of a layout that is not written
    by_rows = x.new_empty((height, width), dtype=torch.uint8) if rows else nothing
    by_columns = x.new_empty((width, padded), dtype=torch.uint8) if columns else nothing
    tiles = -(-padded // kernels.HEIGHT) * -(-width // kernels.WIDTH)
    kernels.cast_kernel[(tiles,)](
        x,
        scale,
        by_rows,
        by_columns,
        counters,
        height,
        width,
        x.stride(0),
        padded,
        **constants(format),
        FROM_AMAX=found,
        WRITE_ROWS=rows,
        WRITE_COLUMNS=columns,
        FIND_AMAX=not found,
        COUNT=statistics,
        HEIGHT=kernels.HEIGHT,
        WIDTH=kernels.WIDTH,
        num_warps=kernels.WARPS,
        enable_fp_fusion=kernels.FP_FUSION,
    )
    dtype = format.dtype
    assert dtype is not None
    return FusedCast(
        rows=by_rows.view(dtype) if rows else None,
        columns=by_columns.view(dtype).t()[:height] if columns else None,
        scale=scale,
        counters=counters,
    )


def _kernels() -> Any:
    """The module of the kernels, which imports Triton."""
    from lightning_fp.kernels.triton import cast

    return cast


@cache
def constants(format: FloatFormat) -> dict[str, Any]:
    """What the kernels have to know of a format."""
    clamped_from = _bits(format.clamp_point) + (0 if format.clamp_point_clamps else 1)
    return {
        "LIMIT": _bits(format.max),
        "MANTISSA": format.mantissa_bits,
        "BIAS": format.bias,
        "NAN": 0x7F,
        "CLAMPED_FROM": clamped_from,
    }


def _bits(value: float) -> int:
    """Of a positive float32."""
    return int.from_bytes(struct.pack("<f", value), "little")
