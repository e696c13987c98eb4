"""Rounding to any e{X}m{Y}, against a list of every number that the format has."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from lightning_fp.format_names import Rounding
from lightning_fp.numerics import FORMATS, float_format, new_seed, random_bits, round_to_format
from tests.numerics.test_casting import assert_same_codes, neighbours

UP_TO_16_BITS = [f"e{e}m{m}" for e in range(2, 9) for m in range(16 - e)]
WIDER = ["e2m23", "e3m20", "e5m14", "e6m12", "e7m9", "e7m23", "e8m8", "e8m15", "e8m23"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "truncate", "stochastic")


def numbers(name: str) -> np.ndarray:
    """Every finite number of a format that is not negative, in the order of its codes; float64."""
    if name in ("e4m3", "e3m2", "e2m3", "e2m1"):  # OCP's, whose largest exponent holds numbers too
        dtypes = {
            "e4m3": ml_dtypes.float8_e4m3fn,
            "e3m2": ml_dtypes.float6_e3m2fn,
            "e2m3": ml_dtypes.float6_e2m3fn,
            "e2m1": ml_dtypes.float4_e2m1fn,
        }
        codes = np.arange(2 ** (sum(int(digit) for digit in name if digit.isdigit())), dtype="u1")
        values = codes.view(dtypes[name]).astype(np.float64)
        return values[np.isfinite(values)]
    exponent_bits, mantissa_bits = (int(part) for part in name[1:].split("m"))
    field, mantissa = np.divmod(
        np.arange((2**exponent_bits - 1) * 2**mantissa_bits, dtype=np.float64), 2**mantissa_bits
    )
    bias = 2 ** (exponent_bits - 1) - 1
    size = (np.where(field > 0, 1.0, 0.0) + mantissa / 2**mantissa_bits) * 2.0 ** (
        np.maximum(field, 1) - bias
    )
    return size


def looked_up(x: np.ndarray, values: np.ndarray, rounding: Rounding) -> np.ndarray:
    """The number of a list that a finite value is rounded to; ties to the even code."""
    size = np.minimum(np.abs(x.astype(np.float64)), values[-1])
    below = np.searchsorted(values, size, side="right") - 1
    above = np.minimum(below + 1, len(values) - 1)
    if rounding == "truncate":
        chosen = below
    else:
        down, up = size - values[below], values[above] - size
        # Codes without a mantissa alternate in nothing: a tie goes to the larger number.
        one_by_one = len(values) > 3 and np.all(values[2:] == 2 * values[1:-1])
        tie = (below > 0) if one_by_one else below % 2 == 1
        chosen = np.where((up < down) | ((up == down) & tie), above, below)
    return np.copysign(values[chosen], x)


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("name", UP_TO_16_BITS)
def test_every_number_and_every_midpoint(name: str, rounding: Rounding) -> None:
    values = numbers(name)
    midpoints = (values[1:] + values[:-1]) / 2
    beyond = values[-1] * np.float64([1.0001, 1.5, 2, 1000])
    x = np.concatenate([values, midpoints, beyond])
    with np.errstate(over="ignore"):  # of bf16's range there is nothing beyond
        x = neighbours(x.astype(np.float32))
    x = np.concatenate([x, -x])
    x = x[np.isfinite(x)]
    y = round_to_format(torch.from_numpy(x), float_format(name), rounding)
    expected = looked_up(x, values, rounding).astype(np.float32)
    assert_same_codes(y, torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("e3m4", ml_dtypes.float8_e3m4), ("e4m3fnuz", ml_dtypes.float8_e4m3fnuz)],
)
def test_other_eight_bits_are_those_of_ml_dtypes(name: str, dtype: type) -> None:
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    x = neighbours(np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32))
    limit = float_format(name).max
    expected = x.clip(-limit, limit).astype(dtype).astype(np.float32)
    assert torch.equal(
        round_to_format(torch.from_numpy(x), float_format(name)), torch.from_numpy(expected)
    )


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("name", ["e2m2", "e3m4", "e5m4", "e6m9", "e8m3", "e8m7"])
def test_gfloat_rounds_alike(name: str, rounding: Rounding) -> None:
    """Over all numbers and midpoints, by a library that knows any format by its parameters."""
    gfloat = pytest.importorskip("gfloat")
    format = float_format(name)
    info = gfloat.FormatInfo(
        name=name,
        k=format.bits,
        precision=format.mantissa_bits + 1,
        bias=format.bias,
        has_nz=True,
        domain=gfloat.Domain.Extended,
        num_high_nans=2**format.mantissa_bits - 1,
        has_subnormals=True,
        is_signed=True,
        is_twos_complement=False,
    )
    values = numbers(name)
    x = np.concatenate([values, (values[1:] + values[:-1]) / 2])[:: max(1, len(values) // 500)]
    x = np.concatenate([x, -x]).astype(np.float32)
    how = {"nearest": gfloat.RoundMode.TiesToEven, "truncate": gfloat.RoundMode.TowardZero}
    expected = [gfloat.round_float(info, float(v), how[rounding], sat=True) for v in x]
    y = round_to_format(torch.from_numpy(x), format, rounding)
    assert_same_codes(y, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", [*UP_TO_16_BITS[::5], *WIDER, *FORMATS])
def test_by_bits_and_by_exponents_are_the_same(name: str, rounding: Rounding) -> None:
    """vmap sees no bits, so that it goes another way."""
    exponents = torch.arange(-150, 128).repeat_interleave(64)
    x = torch.ldexp(1 + torch.rand(len(exponents), generator=generator()), exponents)
    x = torch.cat([x, -x])
    seed, format = new_seed(x.device), float_format(name)
    y = round_to_format(x, format, rounding, seed)
    other = torch.func.vmap(lambda row: round_to_format(row, format, rounding, seed))(x[None])[0]
    assert_same_codes(other, y)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", ["e8m3", "e8m7", "e5m2", "e4m3", "e2m1", "e3m0", "e6m9"])
def test_stochastic_rounding_has_no_bias(name: str) -> None:
    """The mean of n draws is within 3 sigma of the value, of normal and subnormal values alike."""
    torch.manual_seed(0)
    format, n, values = float_format(name), 2**14, 64
    low = format.smallest_subnormal / 8
    x = torch.rand(values, dtype=torch.float64, generator=generator())
    x = low * (min(format.max, 1e4) / low) ** x
    x = torch.where(torch.arange(values) % 2 == 0, x, -x).float()
    drawn = torch.stack(
        [round_to_format(x.repeat(256), format, "stochastic", seed()) for _ in range(n // 256)]
    )
    drawn = drawn.double().view(-1, values)
    down = round_to_format(x, format, "truncate").double()
    distinct = [drawn[:, i].unique() for i in range(values)]
    assert all(len(each) <= 2 for each in distinct)
    spacing = format.epsilon * 2.0 ** down.abs().log2().floor()
    spacing = spacing.clamp(min=format.smallest_subnormal)
    share = (x.double() - down).abs() / spacing
    sigma = spacing * (share * (1 - share) / n).sqrt()
    inexact = share > 0
    z = ((drawn.mean(0) - x.double()) * x.sign().double() / sigma)[inexact]
    # Of 64 means at 3 sigma each one may be beyond; their sum may not.
    assert abs(z.sum()) < 3 * math.sqrt(len(z))
    assert z.abs().max() < 4.5
    assert (z.square().sum() - len(z)).abs() < 3 * math.sqrt(2 * len(z))


def seed() -> Tensor:
    return new_seed(torch.device("cpu"))


@pytest.mark.parametrize("name", ["e8m3", "e4m3", "e5m10"])
def test_what_the_format_has_stays_as_it_is(name: str) -> None:
    values = torch.from_numpy(numbers(float_format(name).text).astype(np.float32))
    for x in (values, -values):
        assert_same_codes(round_to_format(x, float_format(name), "stochastic", seed()), x)


def test_a_seed_says_all_and_two_seeds_have_nothing_in_common() -> None:
    torch.manual_seed(1)
    one, other = seed(), seed()
    shape = torch.Size((512, 512))
    first, second = random_bits(one, shape), random_bits(other, shape)
    assert torch.equal(first, random_bits(one.clone(), shape))
    assert first.min() >= 0
    neighbours_of = first.flatten().roll(1).view(shape)
    next_seed = random_bits(one + torch.tensor([1, 0], dtype=torch.int32), shape)
    for a in (first, second):
        for bit in range(31):  # each as often 0 as 1
            ones = (a >> bit & 1).double().mean().item()
            assert abs(ones - 0.5) < 4 * 0.5 / 512
    for a, b in ((first, second), (first, neighbours_of), (first, next_seed), (first, first.t())):
        together = torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1]
        assert abs(together) < 4 / 512


def test_stochastic_rounding_wants_a_seed() -> None:
    with pytest.raises(ValueError, match=r"seed must be given .* 'stochastic', got None"):
        round_to_format(torch.ones(2), float_format("e8m3"), "stochastic")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
def test_compiled_is_eager_bit_for_bit(backend: str) -> None:
    names = ["e8m3", "e8m0", "e4m3", "e5m9", "e3m0", "e4m5", "e7m21", "e2m22"]
    exponents = torch.arange(-150, 128).repeat_interleave(16)
    x = torch.ldexp(1 + torch.rand(len(exponents), generator=generator()), exponents)
    x = torch.cat([x, torch.arange(2**12) / 2**7])  # the midpoints of narrow formats among them
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])])

    def all_of(x: Tensor, seed: Tensor) -> list[Tensor]:
        return [
            round_to_format(x, float_format(name), rounding, seed)
            for name in names
            for rounding in ROUNDINGS
        ]

    torch._dynamo.reset()
    seed = new_seed(x.device)
    compiled = torch.compile(all_of, backend=backend, fullgraph=True)(x, seed)
    for one, other in zip(all_of(x, seed), compiled, strict=True):
        assert_same_codes(other, one)


def test_a_compiler_that_may_reorder_sums_is_given_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled to C++ here: with this option gcc flushes subnormals of the whole process."""

    def compiled() -> Tensor:
        torch._dynamo.reset()
        function = torch.compile(lambda x: round_to_format(x, e4m5), backend="aot_eager")
        return function(x)

    e4m5 = float_format("e4m5")
    x = torch.randn(2**12, generator=generator())
    sums = "lightning_fp.numerics.simulated._by_sums"
    monkeypatch.setattr(sums, lambda x, format: torch.zeros_like(x))
    assert not compiled().any()
    with inductor_config.patch({"cpp.enable_unsafe_math_opt_flag": True}):
        assert torch.equal(compiled(), round_to_format(x, e4m5))
