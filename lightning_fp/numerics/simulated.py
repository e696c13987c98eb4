"""Rounding to any e{X}m{Y}: to nearest, towards zero, or by chance.

Values stay in float32, so no float8 dtype is needed and every device does it. Normal values are
rounded as integers: a float32 cut after some bits of its mantissa is a number of the format, and
what is added before the cut decides how it rounds. Subnormals of a narrower exponent are whole
multiples of the smallest one, and are rounded as such.

Stochastic rounding takes the upper neighbour as often as the value is near to it, so its mean is
the value. Its noise is a hash of a seed and of the element's place, not a stream of random numbers:
one seed, drawn from torch's generator, gives all noise of a tensor, so that a cast can be repeated
in backward, and eager and compiled code round alike where they have the same seed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from lightning_fp.format_names import Rounding
from lightning_fp.numerics.formats import FloatFormat

_MANTISSA = 23
_EXPONENT = 0x7F800000
_SIGN = -(2**31)

_GOLDEN = -0x61C88647
_MIX = 0x7FEB352D, -0x7B935975
"""2^32 over the golden ratio, and the multipliers of "lowbias32" (Chris Wellons, Hash Function
Prospector, 2018), the mixing function of two multiplications with the least bias found there."""


def round_to_format(
    x: Tensor, format: FloatFormat, rounding: Rounding = "nearest", seed: Tensor | None = None
) -> Tensor:
    """Round float32 values to a format of at most 8 exponent and 23 mantissa bits.

    Args:
        x: any floating-point tensor; computed in float32.
        format: the format to round to.
        rounding: "nearest" (ties to even), "truncate" (towards zero: clears mantissa bits, as in
            arXiv 2405.18710; biased, so run both) or "stochastic" (up or down by chance, without
            bias).
        seed: int32 [2], of `new_seed`; needed by "stochastic" alone.

    Returns:
        float32, same shape. Finite values beyond `format.max` become ±`format.max`; inf and NaN
        stay.

    Raises:
        ValueError: if "stochastic" has no seed.
    """
    x = x.float()
    noise = None
    if rounding == "stochastic":
        if seed is None:
            raise ValueError(
                "seed must be given where rounding is 'stochastic', got None; take"
                " lightning_fp.numerics.new_seed(x.device)"
            )
        noise = random_bits(seed, x.shape)
    if _bits_are_hidden(x):
        rounded = _by_exponent(x, format, rounding, noise).clamp(-format.max, format.max)
    elif rounding == "nearest" and _sums_round(x, format):
        rounded = _by_sums(x.clamp(-format.max, format.max), format)
    else:
        rounded = _by_bits(x, format, rounding, noise).clamp(-format.max, format.max)
    return torch.where(x.abs() < torch.inf, rounded, x)


def new_seed(device: torch.device) -> Tensor:
    """A seed for stochastic rounding, from torch's generator of a device.

    Where the generators of several ranks stand alike, each rank has another seed all the same:
    their errors are to cancel in the mean of their gradients.

    Returns:
        int32 [2].
    """
    drawn = torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, device=device)
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return drawn ^ (rank * _MIX[0] & 0x7FFFFFFF) if rank else drawn


def random_bits(seed: Tensor, shape: torch.Size) -> Tensor:
    """31 random bits for each element of a tensor.

    Args:
        seed: int32 [2].
        shape: the tensor's.

    Returns:
        int32, not negative.
    """
    place = torch.arange(shape.numel(), dtype=torch.int32, device=seed.device).view(shape)
    first, second = seed.unbind()
    bits = place * _GOLDEN + first
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * _MIX[0] + second
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * _MIX[1]
    return (bits ^ ((bits >> 16) & 0xFFFF)) & 0x7FFFFFFF


def _bits_are_hidden(x: Tensor) -> bool:
    """Whether x is seen through vmap, which has no rule for a look at the bits."""
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and is_legacy_batchedtensor(x)


def _by_bits(x: Tensor, format: FloatFormat, rounding: Rounding, noise: Tensor | None) -> Tensor:
    """Finite float32 values, rounded; the range is not looked at."""
    bits = x.view(torch.int32)
    dropped = _MANTISSA - format.mantissa_bits
    below = (1 << dropped) - 1
    if noise is not None:
        bits = bits + (noise >> (31 - dropped))
    elif rounding == "nearest" and dropped:
        last = bits >> dropped
        # Without a mantissa the leading one is the last place: odd, but for float32's subnormals.
        odd = last & 1 if format.mantissa_bits else (last & 0xFF).clamp(max=1)
        bits = bits + ((below >> 1) + odd)
    normal = (bits & ~below).view(torch.float32)
    if format.exponent_bits == 8:  # float32's own exponents, and its own subnormals
        return normal
    steps = _whole(x * (1 / format.smallest_subnormal), rounding, noise)
    return torch.where(x.abs() < format.smallest_normal, steps * format.smallest_subnormal, normal)


def _sums_round(x: Tensor, format: FloatFormat) -> bool:
    """Whether `_by_sums` is the fast way: Inductor does not vectorise a look at bits on a CPU."""
    fits = format.exponent_bits < 8 and format.mantissa_bits < _MANTISSA - 1
    return fits and x.device.type == "cpu" and torch.compiler.is_compiling() and _sums_stay()


@torch.compiler.assume_constant_result
def _sums_stay() -> bool:
    """Whether Inductor's C++ keeps the order of sums.

    It does by -fno-unsafe-math-optimizations, its own default (`cpp_builder.py`), which this option
    of torch leaves out.
    """
    from torch._inductor import config

    return not config.cpp.enable_unsafe_math_opt_flag


def _by_sums(x: Tensor, format: FloatFormat) -> Tensor:
    """float32 values within the range, to nearest, without a look at the bits.

    1.5 * 2^23 times the distance of the format's values around x has that distance in float32: to
    add it rounds, ties to even. Only sums are rounded in here, no products.
    """
    size = x.abs()
    # Veltkamp's splitting leaves one bit: the power of two below a value, or the one above.
    large = size * 2.0**_MANTISSA + size
    power = large - (large - size)
    power = torch.where(power > size, power * 0.5, power).clamp(min=format.smallest_normal)
    shift = power * (1.5 * 2.0 ** (_MANTISSA - format.mantissa_bits))
    return torch.copysign((size + shift) - shift, x)


def _by_exponent(
    x: Tensor, format: FloatFormat, rounding: Rounding, noise: Tensor | None
) -> Tensor:
    """The same without a look at the bits."""
    # Every value of the binade [2^e, 2^(e+1)) is a multiple of 2^(e - mantissa_bits); subnormals
    # share the spacing of the smallest normal binade. Dividing by a power of two is exact.
    _, exponent = torch.frexp(x)
    exponent = (exponent - 1).clamp(min=1 - format.bias) - format.mantissa_bits
    # ldexp multiplies by 2**exponent, which overflows float32 outside of ±126: two steps.
    half = exponent // 2
    steps = torch.ldexp(torch.ldexp(x, -half), half - exponent)
    steps = _whole(steps, rounding, noise)
    return torch.ldexp(torch.ldexp(steps, half), exponent - half)


def _whole(steps: Tensor, rounding: Rounding, noise: Tensor | None) -> Tensor:
    """Whole numbers; zeros keep their sign."""
    if noise is None:
        return steps.round() if rounding == "nearest" else steps.trunc()
    size = steps.abs()
    whole = size.floor()
    # Compared as integers: a sum with a uniform float would round, and small parts would be lost.
    up = noise > 0x7FFFFFFF - ((size - whole) * 2.0**31).to(torch.int32)
    return torch.copysign(torch.where(up, whole + 1, whole), steps)
