"""Fused casts in Triton: everything that one pass over an operand can do.

Scale, saturate, round, write rows and columns, find the amax, count what is not finite, what was
clamped and what became zero. A layer's two products of backward sum over other dimensions than that
of its forward, and the hardware wants what is summed over contiguous; so each operand is needed in
both layouts, which here costs one read and two writes.

Values are rounded by integers, not by the device's conversion: what a kernel writes is defined by
this file on every card, and can be held against torch on a machine without any, by Triton's
interpreter (whose own conversion to float8 is wrong: it makes 1.0 of 1.9375). Maxima and counts are
of integers, so that the order in which blocks arrive changes nothing.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportUnknownVariableType=false, reportOptionalMemberAccess=false

from __future__ import annotations

import triton
import triton.language as tl

INFINITE = tl.constexpr(0x7F800000)
"""Bits of inf in float32; those of NaN are greater."""

AMAX = tl.constexpr(0)
NONFINITE = tl.constexpr(1)
CLAMPED = tl.constexpr(2)
UNDERFLOWN = tl.constexpr(3)
COUNTERS = 4
"""Places in the int32 vector of counters; the amax is there as the bits of a float32."""

HEIGHT = 64
WIDTH = 64
"""Rows and columns of a tile: 64 bytes of codes are written in a row of either layout."""

WARPS = 8
"""Warps of a program: 16 values of a tile for each thread, which leaves room for more programs."""

FP_FUSION = False
"""Whether a product and a sum may be rounded once: there are none here, and left unsaid Triton 3.9
warns of a default that is to change."""

BLOCK = 1024
LOOPS = 8
"""Elements that a program looks at at once for the amax, and how often: one atomic of 8192."""


@triton.jit
def magnitudes(x):
    """Bits of |x| in float32: as integers they are ordered as the values, NaN above inf."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def round_to_code(bits, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """The code of a finite magnitude within range, rounded to nearest, ties to even.

    Args:
        bits: of a float32, without its sign.
        MANTISSA: mantissa bits of the 8-bit format.
        BIAS: of its exponent.
    """
    exponent = bits >> 23
    least = 128 - BIAS  # the exponent in float32 of the smallest normal value
    normal = exponent >= least
    # Below the smallest normal value the step is constant: the mantissa, with its leading one, is
    # shifted by as much more as the exponent is smaller. float32 subnormals round to 0 in any case.
    shift = tl.where(normal, 23 - MANTISSA, tl.minimum(151 - BIAS - MANTISSA - exponent, 31))
    value = tl.where(normal, bits, (bits & 0x7FFFFF) | 0x800000)
    even = (value >> shift) & 1
    rounded = (value + (1 << (shift - 1)) - 1 + even) >> shift
    return tl.where(normal, rounded - ((127 - BIAS) << MANTISSA), rounded)


@triton.jit
def amax_kernel(x_ptr, counters_ptr, size, BLOCK: tl.constexpr, LOOPS: tl.constexpr):
    """The amax and the number of non-finite values of a contiguous tensor, in one launch.

    Args:
        x_ptr: bf16, fp16 or float32.
        counters_ptr: int32 [COUNTERS], zeros before.
        size: elements.
        BLOCK: elements of one step of a program.
        LOOPS: steps of a program.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK * LOOPS
    lanes = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], dtype=tl.int32)
    infinite = tl.zeros([BLOCK], dtype=tl.int32)
    for step in range(LOOPS):
        at = start + step * BLOCK + lanes
        bits = magnitudes(tl.load(x_ptr + at, mask=at < size, other=0.0))
        largest = tl.maximum(largest, bits)
        infinite += (bits >= INFINITE).to(tl.int32)
    tl.atomic_max(counters_ptr + AMAX, tl.max(largest, axis=0))
    count = tl.sum(infinite, axis=0)
    if count != 0:
        tl.atomic_add(counters_ptr + NONFINITE, count)


@triton.jit
def cast_kernel(
    x_ptr,
    scale_ptr,
    rows_ptr,
    columns_ptr,
    counters_ptr,
    height,
    width,
    stride,
    padded,
    LIMIT: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    NAN: tl.constexpr,
    CLAMPED_FROM: tl.constexpr,
    FROM_AMAX: tl.constexpr,
    WRITE_ROWS: tl.constexpr,
    WRITE_COLUMNS: tl.constexpr,
    FIND_AMAX: tl.constexpr,
    COUNT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Cast one tile of a matrix.

    Args:
        x_ptr: bf16, fp16 or float32 [height, width], rows contiguous.
        scale_ptr: float32 scalar: read, or with FROM_AMAX written, by the first program.
        rows_ptr: uint8 [height, width], the codes.
        columns_ptr: uint8 [width, padded], the codes transposed, zeros from `height` on.
        counters_ptr: int32 [COUNTERS]; with FROM_AMAX the amax is there already.
        height: rows.
        width: columns.
        stride: elements from row to row of x.
        padded: `height`, up to the next multiple that the product wants.
        LIMIT: bits of the largest value as float32.
        MANTISSA: mantissa bits of the format.
        BIAS: of its exponent.
        NAN: its code for NaN, without a sign.
        CLAMPED_FROM: bits of the least magnitude that the limit changes and rounding does not.
        FROM_AMAX: whether the scale follows from the amax.
        WRITE_ROWS: whether `rows_ptr` is written.
        WRITE_COLUMNS: whether `columns_ptr` is.
        FIND_AMAX: whether amax and non-finite values are found on the way.
        COUNT: whether clamped and underflown values are counted.
        HEIGHT: rows of a tile.
        WIDTH: columns of a tile.
    """
    across = tl.cdiv(width, WIDTH)
    program = tl.program_id(0)
    i = (program // across) * HEIGHT + tl.arange(0, HEIGHT)
    j = (program % across) * WIDTH + tl.arange(0, WIDTH)
    inside = (i < height)[:, None] & (j < width)[None, :]
    x = tl.load(x_ptr + i.to(tl.int64)[:, None] * stride + j[None, :], mask=inside, other=0.0)

    limit = tl.full([], LIMIT, tl.int32).to(tl.float32, bitcast=True)
    if FROM_AMAX:
        bits = tl.load(counters_ptr + AMAX)
        amax = bits.to(tl.float32, bitcast=True)
        # As `amax_to_scale`: 1 for an empty tensor, NaN for one that is not finite.
        scale = tl.div_rn(limit, tl.maximum(amax, 1e-12))
        scale = tl.where(bits == 0, 1.0, scale)
        nan = tl.full([], 0x7FC00000, tl.int32).to(tl.float32, bitcast=True)
        scale = tl.where(bits >= INFINITE, nan, scale)
        if program == 0:
            tl.store(scale_ptr, scale)
    else:
        scale = tl.load(scale_ptr)

    if FIND_AMAX:
        sizes = magnitudes(x)
        tl.atomic_max(counters_ptr + AMAX, tl.max(tl.max(sizes, axis=1), axis=0))
        infinite = tl.sum(tl.sum((sizes >= INFINITE).to(tl.int32), axis=1), axis=0)
        if infinite != 0:
            tl.atomic_add(counters_ptr + NONFINITE, infinite)

    scaled = (x.to(tl.float32) * scale).to(tl.int32, bitcast=True)
    bits = scaled & 0x7FFFFFFF
    codes = round_to_code(tl.minimum(bits, LIMIT), MANTISSA, BIAS)
    if COUNT:
        finite = inside & (magnitudes(x) < INFINITE) & (bits <= INFINITE)
        beyond = finite & (bits >= CLAMPED_FROM)
        gone = finite & (codes == 0) & (bits > 0)
        tl.atomic_add(counters_ptr + CLAMPED, tl.sum(tl.sum(beyond.to(tl.int32), axis=1), axis=0))
        tl.atomic_add(counters_ptr + UNDERFLOWN, tl.sum(tl.sum(gone.to(tl.int32), axis=1), axis=0))
    codes = tl.where(bits > INFINITE, NAN, codes) | ((scaled >> 24) & 0x80)
    codes = codes.to(tl.uint8)
    if WRITE_ROWS:
        tl.store(rows_ptr + i.to(tl.int64)[:, None] * width + j[None, :], codes, mask=inside)
    if WRITE_COLUMNS:
        filled = tl.where(inside, codes, 0)
        there = (j < width)[:, None] & (i < padded)[None, :]
        place = columns_ptr + j.to(tl.int64)[:, None] * padded + i[None, :]
        tl.store(place, tl.trans(filled), mask=there)
