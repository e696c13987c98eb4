"""Casts that saturate.

The order matters everywhere: look for non-finite values first, then clamp, then cast. A clamp
turns inf into the largest value, and torch itself saturates in some versions and formats and not
in others (e4m3 from torch 2.12 on, e5m2 never), so neither may be left to do it unseen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fp.numerics.formats import format_of_dtype


def saturating_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to nearest even; finite values out of range become the largest finite value.

    Args:
        x: any floating-point tensor.
        dtype: a floating-point dtype, see `lightning_fp.numerics.FORMATS`.

    Returns:
        A tensor of `dtype`. NaN stays NaN; inf stays inf where the format has one, else NaN.
    """
    format = format_of_dtype(dtype)
    # 16-bit inputs cannot hold every format's limit: 65504 is 65536 in bf16.
    x = x if x.dtype is torch.float64 else x.float()
    clamped = x.clamp(-format.max, format.max)
    non_finite = x if format.has_inf else torch.full_like(x, torch.nan)
    return torch.where(torch.isfinite(x), clamped, non_finite).to(dtype)


def scaled_cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply by `scale` in float32, clamp, cast: the cast in front of every FP8 product.

    Does not look for non-finite values, because `amax_to_scale` already did: an inf or a NaN in
    `x` makes its scale NaN, and with it every value that shares the scale.

    Args:
        x: [..., K], any floating-point dtype.
        scale: float32, scalar or broadcastable to `x`.
        dtype: an 8-bit floating-point dtype.

    Returns:
        A tensor of `dtype` with the shape of `x`.
    """
    limit = format_of_dtype(dtype).max
    return clamp_into_new(x, scale, limit).to(dtype)


def clamp_into_new(x: Tensor, scale: Tensor, limit: float) -> Tensor:
    """`x * scale` clamped to ±limit, in a float32 buffer that the caller may overwrite."""
    if torch.compiler.is_compiling():
        return (x.float() * scale).clamp(-limit, limit)
    # Eagerly every pass over memory counts: float32 inputs must not be changed in place, the
    # copies of all others may.
    scaled = x * scale if x.dtype is torch.float32 else x.float().mul_(scale)
    return scaled.clamp_(-limit, limit)
