"""Casts that saturate, and casts that only round.

The order matters everywhere: look for non-finite values first, then clamp, then cast. A clamp
turns inf into the largest value, and torch itself saturates in some versions and formats and not
in others (e4m3 from torch 2.12 on, e5m2 never), so neither may be left to do it unseen.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_fp.numerics.bits import round_bits
from lightning_fp.numerics.devices import has_frexp
from lightning_fp.numerics.formats import FloatFormat, format_of_dtype

Rounding = Literal["nearest", "truncate"]


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


def round_to_format(x: Tensor, format: FloatFormat, rounding: Rounding = "nearest") -> Tensor:
    """Round float32 values to a format of at most 8 exponent and 23 mantissa bits.

    The result stays in float32, so no float8 dtype is needed: this is what the simulated formats
    compute with, on any device.

    Args:
        x: any floating-point tensor; computed in float32.
        format: the format to round to.
        rounding: "nearest" (ties to even) or "truncate" (towards zero: clears mantissa bits, as
            in arXiv 2405.18710; biased, so run both).

    Returns:
        float32, same shape. Finite values beyond `format.max` become ±`format.max`; inf and NaN
        stay.
    """
    x = x.float()
    nearest = rounding == "nearest"
    if has_frexp(x.device):
        rounded = _round_by_exponent(x, format, nearest)
    else:
        rounded = round_bits(x, format, nearest=nearest)
    return torch.where(torch.isfinite(x), rounded.clamp(-format.max, format.max), x)


def _round_by_exponent(x: Tensor, format: FloatFormat, nearest: bool) -> Tensor:
    """Without a look at the bits, which `torch.func.vmap` does not allow."""
    # Every value of the binade [2^e, 2^(e+1)) is a multiple of 2^(e - mantissa_bits); subnormals
    # share the spacing of the smallest normal binade. Dividing by a power of two is exact.
    _, exponent = torch.frexp(x)
    exponent = (exponent - 1).clamp(min=1 - format.bias) - format.mantissa_bits
    # ldexp multiplies by 2**exponent, which overflows float32 outside of ±126: two steps.
    half = exponent // 2
    steps = torch.ldexp(torch.ldexp(x, -half), half - exponent)
    steps = steps.round() if nearest else steps.trunc()
    return torch.ldexp(torch.ldexp(steps, half), exponent - half)
