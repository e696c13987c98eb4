"""Every limit of every format against ml_dtypes, against all codes, and against brute force."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from lightning_fp.numerics import FORMATS, FloatFormat, float_format, format_of_dtype

ML_DTYPES = {
    "fp32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
GENERAL = [
    f"e{exponent_bits}m{mantissa_bits}"
    for exponent_bits in range(2, 9)
    for mantissa_bits in (0, 1, 2, 3, 4, 6)
    if f"e{exponent_bits}m{mantissa_bits}" not in FORMATS
]
WITH_DTYPE = [format.name for format in FORMATS.values() if format.dtype]


def all_codes(format: FloatFormat) -> torch.Tensor:
    """Value of every code of an 8- or 16-bit format, in the order of the codes."""
    container = torch.uint8 if format.bits == 8 else torch.uint16
    codes = torch.arange(2**format.bits, dtype=torch.int32).to(container)
    return codes.view(format.dtype).double()


def ieee_values(exponent_bits: int, mantissa_bits: int) -> list[Fraction]:
    """All finite non-negative values of an IEEE-like format, ascending, straight from 754."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for exponent in range(2**exponent_bits - 1):
        for mantissa in range(2**mantissa_bits):
            leading = 2**mantissa_bits if exponent else 0
            power = max(exponent, 1) - bias - mantissa_bits
            values.append((leading + mantissa) * Fraction(2) ** power)
    return values


def round_unbounded(value: float, format: FloatFormat) -> Fraction:
    """Round to nearest even with the format's precision but no largest exponent."""
    _, exponent = math.frexp(value)
    exponent = max(exponent - 1, 1 - format.bias) - format.mantissa_bits
    spacing = Fraction(2) ** exponent
    return round(Fraction(value) / spacing) * spacing


def test_every_named_format_is_checked():
    assert ML_DTYPES.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_limits_equal_ml_dtypes(name):
    format = float_format(name)
    info = ml_dtypes.finfo(ML_DTYPES[name])
    assert format.max == float(info.max)
    assert format.smallest_normal == float(info.smallest_normal)
    assert format.smallest_subnormal == float(info.smallest_subnormal)
    assert format.epsilon == float(info.eps)
    assert format.bits == info.bits
    assert format.mantissa_bits == info.nmant
    assert format.bias == 1 - info.minexp


@pytest.mark.parametrize("name", WITH_DTYPE)
def test_limits_equal_torch(name):
    format = float_format(name)
    info = torch.finfo(format.dtype)
    assert (format.max, format.bits) == (info.max, info.bits)
    assert format.smallest_normal == info.smallest_normal
    if name != "e5m2fnuz":  # torch 2.13 says 0.125, its own codes say 0.25 (see below)
        assert format.epsilon == info.eps


@pytest.mark.parametrize("name", [name for name in WITH_DTYPE if name != "fp32"])
def test_limits_equal_the_table_of_all_codes(name):
    format = float_format(name)
    table = all_codes(format)
    finite = table[table.isfinite()]
    positive = table[: len(table) // 2]  # sign bit 0: ascending codes
    assert finite.max() == format.max
    assert finite.min() == -format.max
    assert finite[finite > 0].min() == format.smallest_subnormal
    assert positive[1 << format.mantissa_bits] == format.smallest_normal
    assert positive[format.bias << format.mantissa_bits] == 1
    assert positive[(format.bias << format.mantissa_bits) + 1] - 1 == format.epsilon
    assert math.frexp(finite.max())[1] - 1 == format.max_exponent


@pytest.mark.parametrize("name", [name for name in WITH_DTYPE if name != "fp32"])
def test_specials_equal_the_table_of_all_codes(name):
    format = float_format(name)
    table = all_codes(format)
    assert table.isinf().any() == format.has_inf
    mantissas = 2**format.mantissa_bits
    infs, nans = {
        "ieee": (2, 2 * (mantissas - 1)),
        "nan": (0, 2),
        "nan_at_negative_zero": (0, 1),
    }[format.specials]
    assert table.isinf().sum() == infs
    assert table.isnan().sum() == nans
    if format.specials == "nan_at_negative_zero":
        assert table[len(table) // 2].isnan()


@pytest.mark.parametrize("name", ["e3m2", "e2m3", "e2m1"])
def test_mx_elements_have_numbers_only(name):
    format = float_format(name)
    codes = np.arange(2**format.bits, dtype=np.uint8).view(ML_DTYPES[name])
    values = codes.astype(np.float64)
    assert np.isfinite(values).all()
    assert values.max() == format.max
    assert not format.has_inf


@pytest.mark.parametrize("name", [*GENERAL, "fp16", "e5m2"])
def test_general_limits_equal_brute_force(name):
    format = float_format(name)
    values = ieee_values(format.exponent_bits, format.mantissa_bits)
    positive = [value for value in values if value > 0]
    assert values[-1] == format.max
    assert positive[0] == format.smallest_subnormal
    assert values[2**format.mantissa_bits] == format.smallest_normal
    assert values[format.bias * 2**format.mantissa_bits] == 1
    # An m0 format has no neighbour of 1 below 2, and 2 is its next value.
    assert values[format.bias * 2**format.mantissa_bits + 1] - 1 == format.epsilon
    assert format.has_inf


@pytest.mark.parametrize("mantissa_bits", range(24))
@pytest.mark.parametrize("exponent_bits", range(2, 9))
def test_every_general_name_is_known(exponent_bits, mantissa_bits):
    format = float_format(f"e{exponent_bits}m{mantissa_bits}")
    assert (format.exponent_bits, format.mantissa_bits) == (exponent_bits, mantissa_bits)
    assert format.bits == 1 + exponent_bits + mantissa_bits
    # All limits, and so all values, are float32 values: round_to_format stays exact.
    for limit in (format.max, format.smallest_normal, format.smallest_subnormal, format.epsilon):
        assert limit == float(np.float32(limit)) > 0


@pytest.mark.parametrize("name", [*FORMATS, *GENERAL, "e8m22", "e2m23"])
def test_clamp_point_is_where_rounding_leaves_the_format(name):
    format = float_format(name)
    point = format.clamp_point
    assert round_unbounded(math.nextafter(point, 0), format) == format.max
    assert round_unbounded(math.nextafter(point, math.inf), format) > format.max
    assert (round_unbounded(point, format) > format.max) == format.clamp_point_clamps


@pytest.mark.parametrize("name", [*FORMATS, *GENERAL, "e8m22", "e2m23"])
def test_underflow_point_is_where_rounding_gives_zero(name):
    format = float_format(name)
    point = format.underflow_point
    assert round_unbounded(point, format) == 0
    assert round_unbounded(math.nextafter(point, math.inf), format) == format.smallest_subnormal


@pytest.mark.parametrize("name", [name for name in WITH_DTYPE if name != "fp32"])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_clamp_point_equals_ml_dtypes_which_does_not_saturate(name):
    format = float_format(name)
    point = np.float32(format.clamp_point)
    assert point == format.clamp_point
    around = np.array([np.nextafter(point, 0), point, np.nextafter(point, np.inf)], np.float32)
    lost = ~np.isfinite(around.astype(ML_DTYPES[name]).astype(np.float32))
    assert lost.tolist() == [False, format.clamp_point_clamps, True]


@pytest.mark.parametrize(
    ("name", "point", "clamps"),
    [
        ("e4m3", 464, False),
        ("e5m2", 61440, True),
        ("e4m3fnuz", 248, True),
        ("e5m2fnuz", 61440, True),
        ("fp16", 65520, True),
        ("e2m1", 7, True),
        ("e3m2", 30, True),
        ("e2m3", 7.75, True),
        ("e2m0", 3, True),
    ],
)
def test_known_clamp_points(name, point, clamps):
    format = float_format(name)
    assert (format.clamp_point, format.clamp_point_clamps) == (point, clamps)


@pytest.mark.parametrize(
    ("name", "point"), [("e4m3", 2**-10), ("e5m2", 2**-17), ("fp16", 2**-25), ("e2m1", 0.25)]
)
def test_known_underflow_points(name, point):
    assert float_format(name).underflow_point == point


@pytest.mark.parametrize(
    ("alias", "name"),
    [("e4m3fn", "e4m3"), ("e8m7", "bf16"), ("e5m10", "fp16"), ("e8m23", "fp32")],
)
def test_aliases(alias, name):
    assert float_format(alias) is FORMATS[name]
    assert float_format(name) is FORMATS[name]


@pytest.mark.parametrize("name", GENERAL)
def test_general_formats_have_no_dtype_and_their_own_name(name):
    format = float_format(name)
    assert (format.name, format.dtype, format.specials) == (name, None, "ieee")


@pytest.mark.parametrize("name", WITH_DTYPE)
def test_format_of_dtype_is_the_inverse(name):
    format = FORMATS[name]
    assert format_of_dtype(format.dtype) is format


@pytest.mark.parametrize(
    "name",
    ["", "fp8", "E4M3", "e4m3 ", "e4m3\n", "e1m3", "e9m3", "e4m24", "e04m3", "e4m03", "e-4m3"],
)
def test_unknown_name(name):
    with pytest.raises(ValueError, match="number format must be one of fp32, bf16,") as error:
        float_format(name)
    assert f"got {name!r}" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e8m0fnu, torch.bool])
def test_unknown_dtype(dtype):
    with pytest.raises(ValueError, match=rf"dtype must be one of torch.float32.*got {dtype};"):
        format_of_dtype(dtype)
