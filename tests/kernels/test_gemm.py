"""The fast decode paths equal the plain ones, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_fp import convert
from lightning_fp.kernels import gemm, hardware
from lightning_fp.numerics import FORMATS, scaled_cast
from tests.helper import sqnr_db

FP8 = ["e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz"]


def all_codes(name: str) -> torch.Tensor:
    codes = torch.arange(256, dtype=torch.uint8).view(FORMATS[name].dtype)
    return codes[~codes.float().isnan()]


@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FP8)
def test_widening_is_exact(name: str, wide: torch.dtype) -> None:
    codes = all_codes(name)
    assert torch.equal(gemm.widen(codes, FORMATS[name], wide), codes.to(wide))
    assert gemm.widen(codes, FORMATS[name], None) is codes


@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", FP8)
def test_cast_operand_is_the_plain_cast(name: str, dtype: torch.dtype, wide: torch.dtype) -> None:
    format = FORMATS[name]
    x = torch.randn(48, 32).mul(3).to(dtype)
    before, scale = x.clone(), torch.tensor(37.3)
    cast, operand = gemm.cast_operand(x, scale, format, wide)
    plain = scaled_cast(x, scale, format.dtype)
    assert torch.equal(cast.view(torch.uint8), plain.view(torch.uint8))
    assert operand.dtype is wide
    assert torch.equal(operand, plain.to(wide))
    assert torch.equal(x, before), "the input was changed in place"


def test_hardware_operands_stay_fp8() -> None:
    cast, operand = gemm.cast_operand(torch.ones(2, 2), torch.tensor(1.0), FORMATS["e4m3"], None)
    assert operand is cast


def test_a_nan_scale_reaches_every_result() -> None:
    nan, one = torch.tensor(torch.nan), torch.tensor(1.0)
    product = gemm.multiply(torch.ones(3, 4), torch.ones(4, 2), nan, one, torch.bfloat16)
    assert product.isnan().all()


@pytest.mark.parametrize(
    ("fast", "dtype", "expected"),
    [
        (True, torch.bfloat16, torch.bfloat16),
        (True, torch.float32, torch.float32),
        (True, torch.float16, torch.float32),
        (False, torch.bfloat16, torch.float32),
    ],
)
def test_emulation_dtype(
    monkeypatch: pytest.MonkeyPatch, fast: bool, dtype: torch.dtype, expected: torch.dtype
) -> None:
    monkeypatch.setattr(hardware, "CPU_HAS_BF16", fast)
    assert gemm.operand_dtype(torch.ones(1, dtype=dtype)) is expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("format", ["fp8-dynamic", "fp8-dynamic[grad_output=e4m3]"])
def test_results_are_rounded_no_more_than_the_page_says(format: str, dtype: torch.dtype) -> None:
    """Once, to n bits, leaves 6 n + 7.4 dB of what is normal; twice would be 3 dB less."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 192, bias=False, dtype=dtype)
    rows = torch.randn(320, 256).to(dtype)
    weight, g = layer.weight.detach(), torch.randn(320, 192).to(dtype)
    convert(layer, format)
    x = rows.clone().requires_grad_()
    output = layer(x)
    output.backward(g)
    kernel = layer.kernel

    def exact(operand: int, tensor: torch.Tensor) -> torch.Tensor:
        scale, number = kernel.cast_of(operand, tensor, None)
        cast = scaled_cast(tensor, scale, number.dtype)
        return cast.double() * scale.reciprocal().double()

    a, b, c = exact(0, rows), exact(1, weight), exact(2, g)
    expected = {"output": a @ b.t(), "input": c @ b, "weight": c.t() @ a}
    found = {"output": output, "input": x.grad, "weight": layer.weight.grad}
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 19}[dtype]  # the sum's own error
    for name, value in expected.items():
        assert found[name].dtype is dtype
        assert sqnr_db(value, found[name]) > 6.02 * bits + 7, name


@pytest.mark.parametrize("format", ["fp8-dynamic", "fp8-delayed", "mxfp8", "fp8-block"])
def test_the_gradient_of_a_float32_weight_is_rounded_once(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs that multiply bf16, too, whose product torch would round to bf16 (56 dB)."""
    gradients = []
    for fast in (True, False):
        monkeypatch.setattr(hardware, "CPU_HAS_BF16", fast)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48))
        table = convert(model, "high", {"*": format}).precision_map
        x, g = torch.randn(160, 64), torch.randn(160, 48)
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                output = model(x)
            output.backward(g.bfloat16())
            table.step()
        gradients.append(model[0].weight.grad)
    assert gradients[0].dtype is torch.float32
    assert sqnr_db(*gradients) > 120
