"""Rounding by integers: for devices that lack a float8 dtype, or whose compiler cannot store it.

A float32 is read as what it is, an integer mantissa at a power of two, and rounded as such. No
float8 dtype, no float64 and no rounding of floats is involved, so every device and every compiler
gives the same bits, and those are torch's. FP8 values are kept as their codes, a byte each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fp.numerics.formats import FloatFormat

_MANTISSA = 23
_BIAS = 127
_SIGN = -(2**31)
_INFINITY = 0x7F800000


@dataclass(frozen=True)
class _Steps:
    """Magnitudes as whole numbers of the format's steps, each at its own power of two."""

    bits: Tensor
    """int32, the float32 that was read."""

    exponent: Tensor
    """int32, its exponent field; 1 for subnormals."""

    dropped: Tensor
    """int32, how many bits of its mantissa the format does not have."""

    count: Tensor
    """int32, how many steps; rounded."""


def round_bits(x: Tensor, format: FloatFormat, *, nearest: bool = True) -> Tensor:
    """Round to a format's mantissa and to its subnormals, whatever its largest value.

    Args:
        x: float32, finite; what becomes of others is not defined.
        format: of at most 8 exponent and 23 mantissa bits.
        nearest: ties to even; False rounds towards zero.

    Returns:
        float32, same shape.
    """
    steps = _steps(x, format, nearest)
    size = ((steps.exponent - 1) << _MANTISSA) + (steps.count << steps.dropped)
    size = torch.where(steps.count == 0, 0, size)
    return (size | (steps.bits & _SIGN)).view(torch.float32)


def to_codes(x: Tensor, format: FloatFormat) -> Tensor:
    """What `x.to(format.dtype)` stores, as bytes.

    Args:
        x: float32 within ±`format.max`, or NaN.
        format: of 8 bits.

    Returns:
        uint8, same shape.
    """
    steps = _steps(x, format, True)
    normal = (steps.exponent - (_BIAS - format.bias)).clamp(min=1)
    code = ((normal - 1) << format.mantissa_bits) + steps.count
    nan, sign = (steps.bits & ~_SIGN) > _INFINITY, (steps.bits >> 24) & 0x80
    if format.specials == "nan_at_negative_zero":
        code = torch.where(nan, 0x80, torch.where(code == 0, 0, code | sign))
    else:
        code = torch.where(nan, 0x7F, code) | sign
    return code.to(torch.uint8)


def from_codes(codes: Tensor, format: FloatFormat) -> Tensor:
    """The values of codes.

    Args:
        codes: uint8, of a format of 8 bits.
        format: theirs.

    Returns:
        float32, same shape; exact.
    """
    bits = codes.to(torch.int32)
    size = bits & 0x7F
    field = size >> format.mantissa_bits
    mantissa = size - ((field - 1).clamp(min=0) << format.mantissa_bits)
    exponent = field.clamp(min=1) + (_BIAS - format.bias - format.mantissa_bits)
    value = mantissa.float() * (exponent << _MANTISSA).view(torch.float32)
    value = torch.where(bits >= 0x80, -value, value)
    if format.specials == "nan_at_negative_zero":
        return torch.where(bits == 0x80, torch.nan, value)
    if format.specials == "nan":
        return torch.where(size == 0x7F, torch.nan, value)
    top = ((1 << format.exponent_bits) - 1) << format.mantissa_bits
    infinity = torch.where(bits >= 0x80, -torch.inf, torch.inf)
    return torch.where(size < top, value, torch.where(size == top, infinity, torch.nan))


def _steps(x: Tensor, format: FloatFormat, nearest: bool) -> _Steps:
    bits = x.view(torch.int32)
    size = bits & ~_SIGN
    field = size >> _MANTISSA
    exponent = field.clamp(min=1)
    mantissa = size - ((field - 1).clamp(min=0) << _MANTISSA)  # with its leading one, if it has one
    below = (1 + _BIAS - format.bias - exponent).clamp(min=0)  # the format's smallest normal value
    # A mantissa has 24 bits, so that shifted by 25 it is 0 and no tie.
    dropped = (below + (_MANTISSA - format.mantissa_bits)).clamp(max=_MANTISSA + 2)
    if nearest:
        half = ((1 << dropped) - 1) >> 1
        odd = (mantissa >> dropped) & dropped.clamp(max=1)
        mantissa = mantissa + half + odd
    return _Steps(bits, exponent, dropped, mantissa >> dropped)
