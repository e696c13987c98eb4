"""amax against brute force in float64; scales against their definition and against torchao."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_fp.numerics import (
    AMAX_LOWER_BOUND,
    FORMATS,
    amax_to_scale,
    format_of_dtype,
    row_amax,
    scaled_cast,
    tensor_amax,
)

INF, NAN = math.inf, math.nan
LARGEST = torch.finfo(torch.float32).max
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
# The 8-exponent formats are left out: their limit over an amax below 1 overflows float32.
LIMITS = [FORMATS[name].max for name in ("e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz", "e2m1", "fp16")]

every_source = pytest.mark.parametrize(
    "source", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
limits = st.sampled_from(LIMITS)
every_limit = pytest.mark.parametrize("limit", LIMITS)
both_kinds = pytest.mark.parametrize("power_of_two", [False, True])
quiet_inductor = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")

positive = st.floats(min_value=0, exclude_min=True, max_value=LARGEST, width=32)
any_floats = st.floats(width=32) | st.sampled_from([0.0, -0.0, 2.0**-149, -(2.0**-24), 65504.0])
matrices = st.integers(0, 5).flatmap(
    lambda width: st.lists(st.lists(any_floats, min_size=width, max_size=width), max_size=5).map(
        lambda rows: torch.tensor(rows, dtype=torch.float32).reshape(len(rows), width)
    )
)

ADVERSARIAL = {
    "zeros": [[0.0, -0.0], [-0.0, -0.0]],
    "negative": [[-3.0, 2.0], [-1.0, 0.5]],
    "subnormal": [[2.0**-149, -(2.0**-148)], [2.0**-24, -(2.0**-23)]],
    "largest": [[-LARGEST, 1.0], [65504.0, -65504.0]],
    "inf": [[INF, 1.0], [1.0, -2.0]],
    "-inf": [[1.0, -INF], [1.0, 2.0]],
    "nan": [[NAN, 1.0], [1.0, -2.0]],
    "nan and inf": [[NAN, -INF], [INF, -2.0]],
    "one": [[-5.0]],
    "no rows": np.zeros((0, 3)),
    "no columns": np.zeros((3, 0)),
    "nothing": np.zeros((0, 0)),
}


def float64_amax(x: Tensor, **axis) -> np.ndarray:
    """Largest magnitude by numpy, which propagates NaN; 0 where there is nothing."""
    return np.max(np.abs(x.double().numpy()), initial=0.0, **axis)


def assert_amax_equals_brute_force(x: Tensor):
    whole, rows = tensor_amax(x), row_amax(x)
    assert whole.dtype is rows.dtype is torch.float32
    assert whole.shape == ()
    assert rows.shape == (*x.shape[:-1], 1)
    np.testing.assert_array_equal(whole.double().numpy(), float64_amax(x))
    np.testing.assert_array_equal(rows.double().numpy(), float64_amax(x, axis=-1, keepdims=True))


# ------------------------------------------------------------------ amax


@every_source
@settings(deadline=None, max_examples=100)
@given(x=matrices)
def test_amax_equals_brute_force(source, x):
    assert_amax_equals_brute_force(x.to(source))


@every_source
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_amax_of_adversarial_tensors(source, name):
    assert_amax_equals_brute_force(torch.as_tensor(ADVERSARIAL[name]).to(source))


@every_source
def test_amax_takes_any_layout(source):
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)).to(source)
    for view in (x, x.transpose(0, 2), x[1:, ::2, 3:], x.mT, x[:, :0], x[0, 0].expand(3, 8)):
        assert_amax_equals_brute_force(view)


@every_source
@pytest.mark.parametrize("value", [-2.5, 0.0, INF, NAN])
def test_amax_of_a_scalar(source, value):
    amax = tensor_amax(torch.tensor(value, dtype=source))
    assert amax.shape == ()
    np.testing.assert_array_equal(amax, abs(value))


def test_row_amax_keeps_non_finite_values_to_their_row():
    x = torch.tensor([[[1.0, NAN], [-2.0, 1.0]], [[INF, 0.0], [NAN, INF]]])
    np.testing.assert_equal(row_amax(x).tolist(), [[[NAN], [2.0]], [[INF], [NAN]]])


@pytest.mark.parametrize("amax", [tensor_amax, row_amax])
def test_amax_takes_no_gradient(amax):
    x = torch.ones(3, requires_grad=True)
    assert not amax(x).requires_grad
    assert not torch.compile(amax, backend="aot_eager")(x).requires_grad


# ------------------------------------------------------------------ amax_to_scale


@every_limit
@both_kinds
def test_special_amax(limit, power_of_two):
    amax = torch.tensor([0.0, -0.0, INF, NAN])
    scale = amax_to_scale(amax, limit, power_of_two=power_of_two)
    np.testing.assert_equal(scale.tolist(), [1, 1, NAN, NAN])


@every_limit
@both_kinds
def test_scale_is_bounded(limit, power_of_two):
    amax = torch.tensor([2.0**-149, 1e-30, AMAX_LOWER_BOUND])
    scale = amax_to_scale(amax, limit, power_of_two=power_of_two)
    assert scale.unique().numel() == 1
    assert scale[0] <= limit / AMAX_LOWER_BOUND * (1 + 2**-23)
    assert scale[0] > limit / AMAX_LOWER_BOUND * (0.5 if power_of_two else 1 - 2**-22)


@settings(deadline=None, max_examples=300)
@given(amax=positive, limit=limits, power_of_two=st.booleans())
def test_scale_brings_amax_to_the_limit(amax, limit, power_of_two):
    amax = torch.tensor([amax])
    scale = amax_to_scale(amax, limit, power_of_two=power_of_two)
    assert scale.dtype is torch.float32
    product = (amax.double() * scale.double()).item()
    assert product <= limit * (1 + 2**-24)
    if amax > AMAX_LOWER_BOUND:
        assert product > limit * (0.5 if power_of_two else 1 - 2**-23)


@settings(deadline=None, max_examples=300)
@given(amax=positive, limit=limits)
def test_power_of_two_is_the_next_below_the_exact_scale(amax, limit):
    scale = amax_to_scale(torch.tensor(amax), limit, power_of_two=True).item()
    exact = limit / max(amax, np.float32(AMAX_LOWER_BOUND).item())
    assert math.frexp(scale)[0] == 0.5
    assert scale <= exact < 2 * scale


@every_limit
def test_power_of_two_where_the_quotient_is_nearly_one(limit):
    # The exact quotient is a power of two, or just above or below one.
    fraction, _ = math.frexp(limit)
    amax = torch.tensor([fraction * 2.0**exponent for exponent in range(-38, 128)])
    wanted = torch.tensor(limit) / amax
    for shifted, expected in [
        (amax, wanted),
        (amax.nextafter(torch.tensor(0.0)), wanted),
        (amax.nextafter(torch.tensor(INF)), wanted / 2),
    ]:
        assert torch.equal(amax_to_scale(shifted, limit, power_of_two=True), expected)


@both_kinds
def test_scale_keeps_the_shape(power_of_two):
    for shape in ((), (0,), (3, 1), (2, 0, 1)):
        assert amax_to_scale(torch.ones(shape), 448.0, power_of_two=power_of_two).shape == shape


@settings(deadline=None, max_examples=200)
@given(x=matrices, dtype=st.sampled_from(FLOAT8), power_of_two=st.booleans())
def test_rowwise_scaled_cast_neither_clamps_nor_hides(x, dtype, power_of_two):
    format = format_of_dtype(dtype)
    scale = amax_to_scale(row_amax(x), format.max, power_of_two=power_of_two)
    y = scaled_cast(x, scale, dtype).float()
    healthy = x.isfinite().all(dim=-1)
    assert y[~healthy].isnan().all()
    error = (x[healthy].double() * scale[healthy] - y[healthy]).abs()
    # Half a step of the largest binade.
    assert (error <= format.clamp_point - format.max).all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@both_kinds
def test_scale_equals_torchao(dtype, power_of_two):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils = pytest.importorskip("torchao.float8.float8_utils")
    bits = np.random.default_rng(0).integers(1, 0x7F800000, size=2**16, dtype=np.int32)
    amax = torch.from_numpy(bits.view(np.float32))
    expected = utils.amax_to_scale(amax, dtype, round_scales_to_power_of_2=power_of_two)
    scale = amax_to_scale(amax, torch.finfo(dtype).max, power_of_two=power_of_two)
    ulps = (scale.view(torch.int32) - expected.view(torch.int32)).abs()
    assert ulps.max() <= (0 if power_of_two else 1)


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@both_kinds
def test_scale_ignores_the_default_dtype(default, power_of_two):
    amax = torch.tensor([0.0, 1e-20, 1e-3, 1.0, 1e30])
    expected = amax_to_scale(amax, 448.0, power_of_two=power_of_two)
    torch.set_default_dtype(default)
    try:
        scale = amax_to_scale(amax, 448.0, power_of_two=power_of_two)
        empty = tensor_amax(amax[:0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert scale.dtype is empty.dtype is torch.float32
    assert torch.equal(scale, expected)


# ------------------------------------------------------------------ compiled


def all_scales(x: Tensor) -> list[Tensor]:
    """Every amax and every scale: one graph to compile."""
    amaxes = [tensor_amax(x), row_amax(x)]
    scales = [
        amax_to_scale(amax, 448.0, power_of_two=power_of_two)
        for amax in amaxes
        for power_of_two in (False, True)
    ]
    return amaxes + scales


@pytest.mark.parametrize(
    ("source", "backend"),
    [
        (torch.float32, "aot_eager"),
        (torch.bfloat16, "aot_eager"),
        pytest.param(torch.float32, "inductor", marks=quiet_inductor),
    ],
)
def test_compiled_equals_eager(source, backend):
    bits = np.random.default_rng(0).integers(2**32, size=(64, 33), dtype=np.uint32)
    wild = torch.from_numpy(bits.view(np.float32)).to(source)
    tame = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)).to(source)
    sick = tame.clone()
    sick[0], sick[1, 3], sick[2, 5], sick[3] = 0, INF, NAN, 1e-20
    torch._dynamo.reset()
    compiled = torch.compile(all_scales, backend=backend, fullgraph=True)
    for x in (wild, tame, sick):
        for value, expected in zip(compiled(x), all_scales(x), strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
