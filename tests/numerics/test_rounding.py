"""Rounding to FP8 and back is the plain pair of casts, whichever way it is done."""

from __future__ import annotations

import pytest
import torch

from lightning_fp.numerics import FORMATS, as_float16, float_format, round_in_range
from lightning_fp.numerics.rounding import _round_by_arithmetic

FP8 = ["e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz"]


def all_codes(name: str) -> torch.Tensor:
    codes = torch.arange(256, dtype=torch.uint8).view(FORMATS[name].dtype)
    return codes[~codes.float().isnan()]


def between(name: str) -> torch.Tensor:
    """Every value of a format, what lies halfway to the next, and the neighbours of both."""
    values = all_codes(name).float()
    values = values[values.isfinite()].unique()
    points = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.zeros(1), -torch.zeros(1)])
    up, down = (torch.nextafter(points, torch.tensor(end)) for end in (1e9, -1e9))
    random = torch.randn(5000) * torch.logspace(-6, 3, 5000)
    limit = float_format(name).max
    return torch.cat([points, up, down, random]).clamp(-limit, limit)


@pytest.mark.parametrize("name", FP8)
def test_decoding_by_bit_shifts_is_exact_for_every_code(name: str) -> None:
    codes = all_codes(name)
    assert len(codes) >= 250
    fast = as_float16(codes)
    assert fast.dtype is torch.float16
    assert torch.equal(fast.float(), codes.float())
    assert torch.equal(fast.float().signbit(), codes.float().signbit())


@pytest.mark.parametrize("name", [*FP8, "bf16", "fp16"])
def test_rounding_is_the_cast(name: str) -> None:
    x = between(name) if name in FP8 else torch.randn(1000) * 100
    format = float_format(name)
    assert torch.equal(round_in_range(x, format), x.to(format.dtype).float())


@pytest.mark.parametrize("name", FP8)
def test_by_arithmetic_the_error_is_the_same(name: str) -> None:
    x = between(name)
    format = float_format(name)
    rounded = _round_by_arithmetic(x, format)
    assert torch.equal((rounded - x).abs(), (x.to(format.dtype).float() - x).abs())


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
def test_in_compiled_code() -> None:
    """No compiler may contract or reorder what the arithmetic relies on."""
    x, format = between("e4m3"), float_format("e4m3")
    compiled = torch.compile(lambda x: (round_in_range(x, format) - x).abs(), fullgraph=True)
    assert torch.equal(compiled(x), (x.to(format.dtype).float() - x).abs())
