"""Casts against ml_dtypes on every 16-bit pattern, and against exact fractions."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_fp.numerics import (
    FORMATS,
    FloatFormat,
    float_format,
    format_of_dtype,
    round_to_format,
    saturating_cast,
    scaled_cast,
)

ML_DTYPES = {
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
    torch.float8_e4m3fnuz: ml_dtypes.float8_e4m3fnuz,
    torch.float8_e5m2fnuz: ml_dtypes.float8_e5m2fnuz,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float16: np.float16,
    torch.float32: np.float32,
}
MX_ELEMENTS = {
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
FLOAT8 = [dtype for dtype in ML_DTYPES if dtype.itemsize == 1]
NARROW = [dtype for dtype in ML_DTYPES if dtype.itemsize < 4]
NO_NEGATIVE_ZERO = [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
WIDE = [torch.bfloat16, torch.float16, torch.float32]
LARGEST = torch.finfo(torch.float32).max
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, LARGEST, -LARGEST, 2.0**-149, -(2.0**-149)]

every_dtype = pytest.mark.parametrize("dtype", ML_DTYPES, ids=str)
every_float8 = pytest.mark.parametrize("dtype", FLOAT8, ids=str)
every_source = pytest.mark.parametrize("source", WIDE, ids=str)
quiet_inductor = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")

finite_floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
finite_lists = st.lists(finite_floats, min_size=1, max_size=16)
general_formats = st.builds(
    lambda exponent_bits, mantissa_bits: float_format(f"e{exponent_bits}m{mantissa_bits}"),
    st.integers(2, 8),
    st.integers(0, 23),
)
formats = st.sampled_from(list(FORMATS.values())) | general_formats
roundings = st.sampled_from(["nearest", "truncate"])


def codes(x: Tensor) -> Tensor:
    """The bit patterns, so that the sign of zero and the kind of NaN count."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same_codes(value: Tensor, expected: Tensor):
    """Bit-equal, except that any NaN is as good as another."""
    assert value.dtype is expected.dtype
    nan = expected.float().isnan()
    assert torch.equal(value.float().isnan(), nan)
    different = (codes(value) != codes(expected)) & ~nan
    assert not different.any(), (value.float()[different], expected.float()[different])


def clamped_by_numpy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What ml_dtypes, which does not saturate, makes of the clamped finite values."""
    values = x.numpy() if x.dtype is torch.float64 else x.float().numpy()
    limit = float(ml_dtypes.finfo(ML_DTYPES[dtype]).max)
    clamped = np.where(np.isinf(values), values, values.clip(-limit, limit))
    clamped[np.isnan(values)] = np.nan  # quiet: numpy warns when it casts a signalling one
    cast = clamped.astype(values.dtype).astype(ML_DTYPES[dtype])
    container = {1: np.uint8, 2: np.int16, 4: np.int32}[dtype.itemsize]
    return torch.from_numpy(cast.view(container)).view(dtype)


def boundaries(dtype: torch.dtype) -> np.ndarray:
    """Every value of an 8- or 16-bit dtype and every midpoint between two neighbours, float64."""
    container = {1: torch.uint8, 2: torch.uint16}[dtype.itemsize]
    values = torch.arange(256**dtype.itemsize, dtype=torch.int32).to(container).view(dtype)
    values = np.unique(values.double().numpy()[values.float().isfinite()])
    point = format_of_dtype(dtype).clamp_point
    return np.concatenate([values, (values[1:] + values[:-1]) / 2, [point, -point]])


def neighbours(x: np.ndarray) -> np.ndarray:
    """x and the next number on either side, in its own precision."""
    return np.concatenate([x, np.nextafter(x, -np.inf), np.nextafter(x, np.inf)])


def every_pattern(source: torch.dtype) -> Tensor:
    """All 65536 numbers of a 16-bit dtype; a large sample of float32."""
    if source.itemsize == 2:
        return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(source)
    random = np.random.default_rng(0).integers(2**32, size=2**17, dtype=np.uint32)
    # All boundaries of the 8-bit formats, every 15th of the 16-bit ones.
    edges = [boundaries(dtype)[:: 1 if dtype.itemsize == 1 else 15] for dtype in NARROW]
    edges = [neighbours(edge.astype(np.float32)) for edge in edges]
    subnormal = np.arange(2**23, step=2**13 + 1, dtype=np.uint32).view(np.float32)
    samples = [random.view(np.float32), *edges, subnormal, np.float32(SPECIAL)]
    return torch.from_numpy(np.concatenate(samples))


PATTERNS = {source: every_pattern(source) for source in WIDE}


# ------------------------------------------------------------------ saturating_cast


@every_source
@every_dtype
def test_saturating_cast_equals_ml_dtypes(source, dtype):
    x = PATTERNS[source]
    assert_same_codes(saturating_cast(x, dtype), clamped_by_numpy(x, dtype))


@every_dtype
def test_float64_is_clamped_in_float64_and_rounded_through_float32(dtype):
    edges = boundaries(dtype) if dtype.itemsize < 4 else np.float64([1, 1 + 2**-24, LARGEST])
    x = np.concatenate([neighbours(edges), SPECIAL, [1e300, -1e300, 1e-300, -1e-300]])
    x = torch.from_numpy(x)
    in_range = torch.where(x.isinf(), x, x.clamp(-LARGEST, LARGEST)).float()
    assert_same_codes(saturating_cast(x, dtype), saturating_cast(in_range, dtype))
    if dtype not in (torch.float16, torch.float32):  # numpy's own types round once
        assert_same_codes(saturating_cast(x, dtype), clamped_by_numpy(x, dtype))


@every_dtype
def test_non_finite_values_are_kept(dtype):
    nan, *infs = saturating_cast(torch.tensor([math.nan, math.inf, -math.inf]), dtype).float()
    assert nan.isnan()
    if format_of_dtype(dtype).has_inf:
        assert infs == [math.inf, -math.inf]
    else:
        assert all(inf.isnan() for inf in infs)


@pytest.mark.parametrize("dtype", NO_NEGATIVE_ZERO, ids=str)
def test_fnuz_has_one_zero(dtype):
    # -0 has the code of NaN there, and so would a negative value that underflows.
    x = torch.tensor([0.0, -0.0, -1e-30, -format_of_dtype(dtype).underflow_point])
    assert codes(saturating_cast(x, dtype)).tolist() == [0, 0, 0, 0]


@every_float8
def test_saturating_cast_takes_any_layout(dtype):
    x = torch.randn(5, 6, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)) * 300
    y = saturating_cast(x, dtype)
    assert_same_codes(saturating_cast(x.t(), dtype).t(), y)
    assert_same_codes(saturating_cast(x[1:, ::2], dtype), y[1:, ::2])
    assert_same_codes(saturating_cast(x[0, 0], dtype), y[0, 0])
    assert saturating_cast(x[:0], dtype).shape == (0, 6)


@every_float8
def test_saturating_cast_of_float8(dtype):
    x = torch.tensor([-448.0, 3.0, math.nan]).to(torch.float8_e4m3fn)
    assert_same_codes(saturating_cast(x, dtype), saturating_cast(x.float(), dtype))


@every_source
def test_saturating_cast_leaves_its_input_alone(source):
    x = torch.tensor([1e9, -1e9, math.inf, math.nan]).to(source)
    before = codes(x).clone()
    saturating_cast(x, torch.float8_e4m3fn)
    assert torch.equal(codes(x), before)


# ------------------------------------------------------------------ scaled_cast


@settings(deadline=None, max_examples=300)
@given(
    values=finite_lists,
    scale=finite_floats,
    source=st.sampled_from(WIDE),
    dtype=st.sampled_from(FLOAT8),
)
def test_scaled_cast_saturates_the_float32_product(values, scale, source, dtype):
    limit = torch.finfo(source).max
    x = torch.tensor(values).clamp(-limit, limit).to(source)
    product = x.float() * torch.tensor(scale)
    # A finite product that overflows float32 saturates like any other.
    expected = saturating_cast(product.clamp(-LARGEST, LARGEST), dtype)
    assert_same_codes(scaled_cast(x, torch.tensor(scale), dtype), expected)


@every_source
@every_float8
@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0**-20])
def test_scaled_cast_of_every_finite_pattern(source, dtype, scale):
    x = PATTERNS[source]
    x = x[x.isfinite()]
    scale = torch.tensor(scale)
    assert_same_codes(scaled_cast(x, scale, dtype), saturating_cast(x.float() * scale, dtype))


@every_float8
def test_scaled_cast_beyond_float32_saturates(dtype):
    limit = torch.finfo(dtype).max
    y = scaled_cast(torch.tensor([1e30, -1e30]), torch.tensor(1e30), dtype)
    assert y.float().tolist() == [limit, -limit]


@every_float8
def test_scaled_cast_leaves_non_finite_values_to_the_scale(dtype):
    x = torch.tensor([math.inf, 1.0, math.nan])
    assert scaled_cast(x, torch.tensor(1.0), dtype).float()[0] == torch.finfo(dtype).max
    assert scaled_cast(x, torch.tensor(1.0), dtype).float()[2].isnan()
    assert scaled_cast(x, torch.tensor(math.nan), dtype).float().isnan().all()


@every_source
@every_float8
def test_nan_scale_spoils_all_that_shares_it(source, dtype):
    x = torch.tensor([[0.0, -0.0, 1.0, -1e4], [0.0, -0.0, 1.0, -1e4]]).to(source)
    spoilt, kept = scaled_cast(x, torch.tensor([[math.nan], [1.0]]), dtype).float()
    assert spoilt.isnan().all()
    assert kept.isfinite().all()


@pytest.mark.parametrize("source", [*WIDE, torch.float64], ids=str)
def test_scaled_cast_leaves_its_input_alone(source):
    x = torch.tensor([1e3, -1e3, 0.1], dtype=source)
    before, scale = x.clone(), torch.tensor(7.0)
    scaled_cast(x, scale, torch.float8_e4m3fn)
    assert torch.equal(x, before)
    assert scale == 7


@every_source
@pytest.mark.parametrize("shape", [(), (3, 1), (1, 4), (3, 4)], ids=str)
def test_scaled_cast_broadcasts_the_scale(source, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=generator).to(source)
    scale = torch.rand(shape, generator=generator) * 100
    y = scaled_cast(x, scale, torch.float8_e4m3fn)
    assert y.shape == (3, 4)
    assert_same_codes(y, saturating_cast(x.float() * scale, torch.float8_e4m3fn))


@every_source
def test_scaled_cast_of_a_parameter(source):
    x = torch.nn.Parameter(torch.tensor([0.5, 1e4], dtype=source))
    y = scaled_cast(x, torch.tensor(2.0), torch.float8_e5m2)
    assert y.float().tolist() == [1, 20480]


# ------------------------------------------------------------------ round_to_format


@every_source
@every_dtype
def test_round_to_format_equals_saturating_cast(source, dtype):
    x = PATTERNS[source]
    y = round_to_format(x, format_of_dtype(dtype))
    assert y.dtype is torch.float32
    finite = x.isfinite()
    expected = saturating_cast(x[finite], dtype).float()
    if dtype in NO_NEGATIVE_ZERO:
        assert torch.equal(y[finite], expected)
    else:
        assert_same_codes(y[finite], expected)
    assert_same_codes(y[~finite], x[~finite].float())


@pytest.mark.parametrize("name", MX_ELEMENTS)
def test_round_to_format_equals_ml_dtypes_for_mx_elements(name):
    x = PATTERNS[torch.float32]
    x = x[x.isfinite()]
    limit = float_format(name).max
    expected = x.clamp(-limit, limit).numpy().astype(MX_ELEMENTS[name]).astype(np.float32)
    assert_same_codes(round_to_format(x, float_format(name)), torch.from_numpy(expected))


@every_source
@pytest.mark.parametrize("mantissa_bits", range(24))
def test_truncation_masks_mantissa_bits(source, mantissa_bits):
    x = PATTERNS[source].float()
    x = x[x.isfinite()]
    # Subnormals too: e8 formats share float32's smallest exponent.
    masked = (x.view(torch.int32) & -(1 << (23 - mantissa_bits))).view(torch.float32)
    y = round_to_format(x, float_format(f"e8m{mantissa_bits}"), "truncate")
    assert_same_codes(y, masked)


@every_dtype
def test_truncation_goes_towards_zero_by_less_than_one_step(dtype):
    x = PATTERNS[torch.float32]
    format = format_of_dtype(dtype)
    x = x[x.abs() <= format.max]
    down = round_to_format(x, format, "truncate")
    assert (down.abs() <= x.abs()).all()
    assert torch.equal(round_to_format(down, format), down)
    step = (x.abs().double() * format.epsilon).clamp(min=format.smallest_subnormal)
    assert ((x.double() - down.double()).abs() < step).all()


def exact(value: float, format: FloatFormat, rounding: str) -> float:
    """Rounding to a format in rational numbers."""
    magnitude = abs(Fraction(value))
    exponent = 1 - format.bias
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    spacing = Fraction(2) ** (exponent - format.mantissa_bits)
    steps = round(magnitude / spacing) if rounding == "nearest" else magnitude // spacing
    return math.copysign(min(float(steps * spacing), format.max), value)


@settings(deadline=None, max_examples=300)
@given(values=finite_lists, format=formats, rounding=roundings)
def test_round_to_format_is_exact(values, format, rounding):
    y = round_to_format(torch.tensor(values), format, rounding)
    expected = torch.tensor([exact(value, format, rounding) for value in values])
    assert_same_codes(y, expected)


@settings(deadline=None, max_examples=200)
@given(
    codes_in_range=st.lists(st.integers(-(2**12), 2**12), min_size=1, max_size=16),
    shift=st.integers(-6, 6),
    format=formats,
    rounding=roundings,
)
def test_round_to_format_is_exact_at_ties(codes_in_range, shift, format, rounding):
    # Multiples of half a step near the limits of the format, where hypothesis seldom looks.
    edge = (format.smallest_subnormal, format.smallest_normal, 1.0, format.max)
    values = [
        float(np.float32(base * (1 + code * format.epsilon / 4) * 2.0**shift))
        for code in codes_in_range
        for base in edge
        if abs(base * (1 + code * format.epsilon / 4) * 2.0**shift) <= LARGEST
    ]
    y = round_to_format(torch.tensor(values), format, rounding)
    expected = torch.tensor([exact(value, format, rounding) for value in values])
    assert_same_codes(y, expected)


@settings(deadline=None, max_examples=200)
@given(values=finite_lists, format=formats, rounding=roundings)
def test_round_to_format_is_idempotent_monotone_and_odd(values, format, rounding):
    x = torch.tensor(values).sort().values
    y = round_to_format(x, format, rounding)
    assert_same_codes(round_to_format(y, format, rounding), y)
    assert (y[1:] >= y[:-1]).all()
    assert_same_codes(round_to_format(-x, format, rounding), -y)


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("name", [*FORMATS, "e2m0", "e8m0", "e8m3", "e2m23", "e5m7"])
def test_special_values(name, rounding):
    format = float_format(name)
    y = round_to_format(torch.tensor(SPECIAL), format, rounding)
    smallest = 2.0**-149 if format.smallest_subnormal == 2.0**-149 else 0.0
    expected = [0.0, -0.0, math.inf, -math.inf, math.nan, format.max, -format.max]
    assert_same_codes(y, torch.tensor([*expected, smallest, -smallest]))


@pytest.mark.parametrize("source", [torch.float8_e5m2, torch.float16, torch.float64], ids=str)
def test_round_to_format_computes_in_float32(source):
    x = torch.tensor([1.25, -7.0, 0.0]).to(source)
    before = x.clone()
    y = round_to_format(x, float_format("e8m1"))
    assert y.dtype is torch.float32
    assert y.tolist() == [1, -8, 0]
    assert torch.equal(x.float(), before.float())


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casts_ignore_the_default_dtype(default):
    # Lightning sets it in its "true" precisions; 2**exponent would overflow float16.
    x = torch.tensor([1e-42, 1e-30, 1.3, 1e30, -LARGEST])
    scale = torch.tensor(3.0)
    casts = [
        lambda: round_to_format(x, float_format("e8m3")),
        lambda: scaled_cast(x, scale, torch.float8_e4m3fn),
        lambda: saturating_cast(x, torch.float16),
    ]
    expected = [cast() for cast in casts]
    torch.set_default_dtype(default)
    try:
        values = [cast() for cast in casts]
    finally:
        torch.set_default_dtype(torch.float32)
    for value, wanted in zip(values, expected, strict=True):
        assert_same_codes(value, wanted)


# ------------------------------------------------------------------ compiled


def scaled_casts(x: Tensor, scale: Tensor) -> list[Tensor]:
    casts = [scaled_cast(x, scale, dtype) for dtype in FLOAT8]
    # A 0-dim scale does not promote the type of its product.
    return [*casts, scaled_cast(x, scale[0, 0], torch.float8_e4m3fn)]


def all_casts(x: Tensor, scale: Tensor) -> list[Tensor]:
    casts = scaled_casts(x, scale)
    casts += [saturating_cast(x, dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)]
    for name in ("e4m3", "e8m3"):
        casts.append(round_to_format(x, float_format(name)))
        casts.append(round_to_format(x, float_format(name), "truncate"))
    return casts


@pytest.mark.parametrize(
    ("casts", "source", "backend"),
    [
        (all_casts, torch.float32, "aot_eager"),
        (all_casts, torch.bfloat16, "aot_eager"),
        pytest.param(scaled_casts, torch.bfloat16, "inductor", marks=quiet_inductor),
    ],
)
def test_compiled_equals_eager(casts, source, backend):
    x = PATTERNS[source]
    x = x[: len(x) // 16 * 16].reshape(16, -1)
    # 0.3 is not exact; one row's scale is NaN, one's overflows.
    scale = torch.full((16, 1), 0.3)
    scale[1], scale[2] = math.nan, LARGEST
    torch._dynamo.reset()
    compiled = torch.compile(casts, backend=backend, fullgraph=True)(x, scale)
    for value, expected in zip(compiled, casts(x, scale), strict=True):
        assert_same_codes(value, expected)
