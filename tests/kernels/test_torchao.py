"""TorchaoKernel is torchao's own Float8Linear, bit for bit, and is defined where that raises."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from torch import nn

from lightning_fp.kernels import Kernel, TorchaoKernel
from lightning_fp.kernels.torchao import import_float8

RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]


def config(recipe: str) -> Any:
    return import_float8().Float8LinearConfig.from_recipe_name(recipe)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_equals_torchaos_own_linear(recipe: str, dtype: torch.dtype, autocast: bool) -> None:
    linear = nn.Linear(64, 48).to(dtype)
    weight, bias = (p.detach().clone().requires_grad_() for p in (linear.weight, linear.bias))
    theirs = import_float8().convert_to_float8_training(
        nn.Sequential(linear), config=dataclasses.replace(config(recipe), emulate=True)
    )
    assert type(theirs[0]).__name__ == "Float8Linear"
    x = torch.randn(2, 32, 64, dtype=dtype)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    # Their autocast asks CUDA only; what it does there is this cast.
    expected = theirs(x1.bfloat16() if autocast else x1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = TorchaoKernel(config=config(recipe))(x2, weight, bias, "layer")
    assert output.dtype is expected.dtype
    assert torch.equal(output, expected)
    gradient = torch.randn(2, 32, 48).to(output.dtype)
    expected.backward(gradient)
    output.backward(gradient)
    for ours, other in ((x2, x1), (weight, theirs[0].weight), (bias, theirs[0].bias)):
        assert ours.grad is not None
        assert torch.equal(ours.grad, other.grad)


@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_equals_eager(recipe: str) -> None:
    kernel, results = TorchaoKernel(config=config(recipe)), []
    tensors = [torch.randn(32, 64), torch.randn(48, 64), torch.randn(48)]

    def forward(*tensors: torch.Tensor) -> torch.Tensor:
        return kernel(*tensors, "layer")

    for function in (forward, torch.compile(forward, backend="aot_eager", fullgraph=True)):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        output = function(*leaves)
        output.square().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(0, 32), (3, 0, 32)])
def test_empty_inputs(shape: tuple[int, ...], recipe: str) -> None:
    x, weight = torch.empty(shape, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    output = TorchaoKernel(config=config(recipe))(x, weight, None, "layer")
    assert output.shape == (*shape[:-1], 16)
    output.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 5, 32)])
def test_any_leading_dimensions(shape: tuple[int, ...], recipe: str) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    output = TorchaoKernel(config=config(recipe))(x, weight, torch.randn(16), "layer")
    assert output.shape == (*shape[:-1], 16)
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_inputs_are_never_hidden(value: float) -> None:
    x, weight = torch.randn(16, 32), torch.randn(16, 32)
    x[3, 5] = value
    whole = TorchaoKernel(config=config("tensorwise"))(x, weight, None, "layer")
    assert whole.isnan().all()
    rowwise = TorchaoKernel(config=config("rowwise"))(x, weight, None, "layer")
    assert rowwise[3].isnan().all()
    assert rowwise[torch.arange(16) != 3].isfinite().all()


def test_fsdp_all_gather_is_refused() -> None:
    with_gather = import_float8().Float8LinearConfig(enable_fsdp_float8_all_gather=True)
    with pytest.raises(ValueError, match="enable_fsdp_float8_all_gather must be False, got True"):
        TorchaoKernel(config=with_gather)


def test_protocol() -> None:
    kernel = TorchaoKernel(config=config("rowwise"))
    assert isinstance(kernel, Kernel)
    assert kernel == TorchaoKernel(config=config("rowwise"))
    assert hash(kernel) == hash(TorchaoKernel(config=config("rowwise")))
    assert kernel != TorchaoKernel(config=config("tensorwise"))
    assert (kernel.name, kernel.runs_on_fp8_hardware) == ("torchao (emulated)", False)
    on_gpu = TorchaoKernel(config=config("rowwise"), cuda_fp8=True)
    assert (on_gpu.name, on_gpu.runs_on_fp8_hardware) == ("torchao", True)
    emulate = import_float8().Float8LinearConfig(emulate=True)
    assert not TorchaoKernel(config=emulate, cuda_fp8=True).runs_on_fp8_hardware


def test_importing_torchao_leaves_logging_as_it_is() -> None:
    level = logging.getLogger().level
    import_float8()
    assert logging.getLogger().level == level
