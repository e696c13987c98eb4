"""SimulatedKernel rounds its three operands, and does nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_fp.kernels import Kernel, SimulatedKernel
from lightning_fp.numerics import FloatFormat, float_format, round_to_format
from lightning_fp.numerics.casting import Rounding
from tests.helper import assert_product, sqnr_db


def simulated(name: str, rounding: Rounding = "nearest") -> SimulatedKernel:
    format = float_format(name)
    return SimulatedKernel(input=format, weight=format, grad_output=format, rounding=rounding)


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(2, 24, 32, requires_grad=True)
    weight = torch.randn(16, 32, requires_grad=True)
    bias = torch.randn(16, requires_grad=True)
    return x, weight, bias, torch.randn(2, 24, 16)


def test_protocol() -> None:
    kernel = simulated("e8m3")
    assert isinstance(kernel, Kernel)
    assert kernel == simulated("e8m3") != simulated("e8m3", "truncate")
    assert hash(kernel) == hash(simulated("e8m3"))
    assert kernel.name == "simulated"
    assert not kernel.runs_on_fp8_hardware


def test_e8m7_is_bf16_rounding_of_the_operands() -> None:
    x, weight, bias, gradient = operands()
    output = simulated("e8m7")(x, weight, bias, "layer")
    output.backward(gradient)
    x16, w16, g16 = (t.detach().bfloat16().float() for t in (x, weight, gradient))
    assert torch.equal(output, F.linear(x16, w16) + bias)
    assert x.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    assert_product(x.grad, g16, w16)
    assert_product(weight.grad, g16.flatten(0, 1).t(), x16.flatten(0, 1))
    torch.testing.assert_close(bias.grad, gradient.sum((0, 1)))


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("name", ["e8m3", "e5m2", "e4m3fnuz"])
def test_operands_are_rounded_to_the_format(name: str, rounding: Rounding) -> None:
    x, weight, _, _ = operands()
    format: FloatFormat = float_format(name)
    output = simulated(name, rounding)(x, weight, None, "layer")
    expected = F.linear(
        round_to_format(x, format, rounding), round_to_format(weight, format, rounding)
    )
    assert torch.equal(output, expected)


def test_more_mantissa_is_more_accurate() -> None:
    x, weight, _, _ = operands()
    reference = F.linear(x.double(), weight.double())
    errors = [sqnr_db(reference, simulated(f"e8m{m}")(x, weight, None, "")) for m in range(1, 10)]
    assert errors == sorted(errors)
    assert errors[-1] > errors[0] + 40


def test_non_finite_values_are_never_hidden() -> None:
    x, weight, _, _ = operands()
    with torch.no_grad():
        x[0, 0, 0], x[1, 1, 1] = torch.inf, torch.nan
    output = simulated("e8m3")(x, weight, None, "layer")
    assert not output[0, 0].isfinite().any()
    assert output[1, 1].isnan().all()
    assert output[0, 1:].isfinite().all()


def test_autocast_and_empty_input() -> None:
    kernel = simulated("e8m3")
    x, weight, bias, _ = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = kernel(x, weight, bias, "layer")
    assert output.dtype is torch.bfloat16
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is torch.float32
    empty = torch.empty(0, 32, requires_grad=True)
    kernel(empty, weight, bias, "layer").sum().backward()
    assert empty.grad is not None


def test_compiled_equals_eager_under_autocast() -> None:
    kernel, results = simulated("e8m3"), []

    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return kernel(x, weight, None, "layer")

    for function in (forward, torch.compile(forward, backend="aot_eager", fullgraph=True)):
        x, weight, _, gradient = (t.detach().requires_grad_() for t in operands_of(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = function(x, weight)
        output.backward(gradient.detach().to(output.dtype))
        results.append((output, x.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def operands_of(seed: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    return operands()
