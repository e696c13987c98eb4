"""Rounding by integers gives torch's bits: for every 16-bit value, and float32 around every tie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_fp.numerics import FORMATS, FloatFormat, float_format, scaled_cast
from lightning_fp.numerics.bits import from_codes, round_bits, to_codes

FP8 = ["e4m3", "e4m3fnuz", "e5m2", "e5m2fnuz"]


def every_value(dtype: torch.dtype) -> Tensor:
    """Of 16 bits; NaN and inf of both signs among them."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def float32(format: FloatFormat) -> Tensor:
    """Random bits; all values of the format, the ties between them, and what is next to these."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**20,), generator=generator).int()
    values = torch.arange(256, dtype=torch.uint8).view(format.dtype).float()
    values = values[torch.isfinite(values)].unique()
    ties = torch.cat([values, (values[1:] + values[:-1]) / 2])
    next_to = [torch.nextafter(ties, torch.tensor(to)) for to in (-torch.inf, torch.inf)]
    return torch.cat([bits.view(torch.float32), ties, *next_to])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FP8)
def test_codes_are_torchs(name: str, dtype: torch.dtype) -> None:
    """Saturating: a clamp goes before, as in every cast here."""
    format = FORMATS[name]
    x = float32(format) if dtype is torch.float32 else every_value(dtype)
    for scale in (torch.tensor(1.0), torch.tensor(37.3), torch.tensor(2.0**-7)):
        expected = scaled_cast(x, scale, format.dtype).view(torch.uint8)
        clamped = (x.float() * scale).clamp(-format.max, format.max)
        assert torch.equal(to_codes(clamped, format), expected)


@pytest.mark.parametrize("name", FP8)
def test_every_code_has_torchs_value(name: str) -> None:
    format = FORMATS[name]
    codes = torch.arange(256, dtype=torch.uint8)
    found, expected = from_codes(codes, format), codes.view(format.dtype).float()
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(found[number].view(torch.int32), expected[number].view(torch.int32))
    kept = number & torch.isfinite(expected)
    assert torch.equal(to_codes(expected[kept], format), codes[kept])


@pytest.mark.parametrize("name", FP8)
def test_rounding_is_coding_and_back(name: str) -> None:
    format = FORMATS[name]
    x = float32(format).clamp(-format.max, format.max)
    x = x[~x.isnan()]
    assert torch.equal(round_bits(x, format), x.to(format.dtype).float())


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_wider_formats_round_as_torchs_dtypes_do(name: str) -> None:
    format = float_format(name)
    x = float32(FORMATS["e5m2"])
    x = x[x.abs() <= format.max]  # also bf16's subnormals, which are float32's
    assert torch.equal(round_bits(x, format), x.to(format.dtype).float())


@pytest.mark.parametrize("name", ["fp32", "e8m3", "e8m0", "e2m1", "e5m23", "e7m22"])
def test_laws_of_rounding(name: str) -> None:
    """Towards zero: no larger, less than a step away; nearest: half a step at most."""
    format = float_format(name)
    x = float32(FORMATS["e4m3"])
    x = x[x.abs() <= format.max].double()
    down, near = (round_bits(x.float(), format, nearest=n).double() for n in (False, True))
    exponent = torch.frexp(x)[1].clamp(min=2 - format.bias) - 1 - format.mantissa_bits
    step = torch.ldexp(torch.ones_like(x), exponent)
    assert (down.abs() <= x.abs()).all()
    assert ((x - down).abs() < step).all()
    assert ((x - near).abs() <= step / 2).all()
    assert (torch.fmod(near / step, 1) == 0).all()
    assert torch.equal(down.signbit(), x.signbit())
