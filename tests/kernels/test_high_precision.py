"""HighPrecisionKernel is nn.Linear."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from lightning_fp.kernels import HighPrecisionKernel, Kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_protocol() -> None:
    kernel = HighPrecisionKernel()
    assert isinstance(kernel, Kernel)
    assert kernel == HighPrecisionKernel()
    assert hash(kernel) == hash(HighPrecisionKernel())
    assert kernel.name == "nn.Linear"
    assert not kernel.runs_on_fp8_hardware


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_equals_linear_in_its_dtype(
    dtype: torch.dtype | None, autocast: torch.dtype | None
) -> None:
    x, weight, bias = torch.randn(3, 5, 16), torch.randn(8, 16), torch.randn(8)
    context = nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)
    with context:
        output = HighPrecisionKernel(dtype=dtype)(x, weight, bias, "layer")
        plain = F.linear(x, weight, bias)
    if dtype in (None, autocast) or (dtype is torch.float32 and autocast is None):
        expected = plain
    else:
        expected = F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
        # Under autocast the layer's dtype goes on, as autocast's would; else the input's does.
        expected = expected if autocast else expected.to(x.dtype)
    assert output.dtype is expected.dtype
    assert torch.equal(output, expected)


def test_gradients_come_back_in_the_operands_dtypes() -> None:
    x = torch.randn(4, 16, requires_grad=True)
    weight = torch.randn(8, 16, requires_grad=True)
    HighPrecisionKernel(dtype=torch.bfloat16)(x, weight, None, "layer").sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.dtype is weight.grad.dtype is torch.float32


@pytest.mark.parametrize("shape", [(16,), (0, 16), (2, 3, 16)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backward_too_computes_in_its_dtype_under_autocast(
    dtype: torch.dtype, compiled: bool, shape: tuple[int, ...]
) -> None:
    kernel, results = HighPrecisionKernel(dtype=dtype), []
    tensors = [torch.randn(shape), torch.randn(8, 16), torch.randn(8)]

    def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return kernel(x, weight, bias, "layer")

    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))

    if compiled:
        ours = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for function, autocast in ((ours, True), (plain, False)):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = function(*leaves)
        output.square().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
