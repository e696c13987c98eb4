"""The casts of weights are those that the kernels make, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_fp.kernels import BlockKernel, NativeKernel, TorchaoKernel
from lightning_fp.kernels.block_products import cast_in_blocks
from lightning_fp.kernels.gemm import cast_operand
from lightning_fp.layers import kernel_for, linear_format
from lightning_fp.rl.engine.weight_casts import scaled_by, weight_cast

SHAPES = [(144, 160), (256, 128), (3, 5), (1, 300)]
FORMATS = [
    "fp8-dynamic",
    "fp8-dynamic[weight=e5m2]",
    "fp8-dynamic[power_of_two=true]",
    "fp8-block",
    "fp8-block[power_of_two=true]",
    "fp8-rowwise",
    "fp8-rowwise[power_of_two=false]",
    "fp8-rowwise-gw-hp",
]


def weight_of(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 0.05).to(dtype)


def cast_by_kernel(format: str, weight: Tensor, monkeypatch: Any) -> tuple[Tensor, Tensor]:
    """Codes, and what they are multiplied by, out of the kernel itself."""
    kernel = kernel_for(linear_format(format), "auto", cuda_fp8=False)
    if isinstance(kernel, NativeKernel):
        exported = kernel.exported(weight)
        scale, number = kernel.cast_of(1, weight, None)
        codes, _ = cast_operand(exported, scale, number, torch.float32)
        return codes, scale.reciprocal()
    if isinstance(kernel, BlockKernel):
        exported, block = kernel.exported(weight), kernel.weight_block
        scale = kernel.scale(exported, block, kernel.weight)
        cast = cast_in_blocks(exported, scale, block, kernel.weight)
        return cast.values, scale.reciprocal()
    assert isinstance(kernel, TorchaoKernel)
    from torchao.float8 import float8_linear

    made: list[Any] = []
    theirs = float8_linear.hp_tensor_to_float8_dynamic

    def spy(*args: Any, **kwargs: Any) -> Any:
        made.append(theirs(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(float8_linear, "hp_tensor_to_float8_dynamic", spy)
    kernel(torch.ones(4, weight.shape[1]), weight, None, "layer")
    transposed = next(each for each in made if each._data.shape == weight.t().shape)
    scale = transposed._scale
    return transposed._data.t(), (scale.t() if scale.dim() == 2 else scale).reciprocal()


@pytest.mark.parametrize("format", [f for f in FORMATS])
@pytest.mark.parametrize("like", ["master", "bf16-export"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_are_the_kernels(
    format: str, like: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem, _, changes = format.partition("[")
    name = f"{stem}[{changes.rstrip(']')}{',' if changes else ''}quantise_like={like}]"
    for shape in SHAPES:
        weight = weight_of(shape, dtype)
        codes, scale = cast_by_kernel(name, weight, monkeypatch)
        found = weight_cast(weight, linear_format(name))
        assert torch.equal(found.tensor.view(torch.uint8), codes.contiguous().view(torch.uint8))
        assert torch.equal(found.scale, scale)
        assert found.scale.dtype == torch.float32


def test_delayed_scales() -> None:
    weight, given = weight_of((16, 32)), torch.tensor(256.0)
    format = linear_format("fp8-delayed")
    found = weight_cast(weight, format, given)
    codes, _ = cast_operand(weight, given, NativeKernel().weight, torch.float32)
    assert torch.equal(found.tensor.view(torch.uint8), codes.view(torch.uint8))
    assert found.scale == 1 / 256
    own = weight_cast(weight, linear_format("fp8-dynamic")).scale
    for none_yet in (torch.tensor(0.0), None):
        assert weight_cast(weight, format, none_yet).scale == own


def test_in_blocks() -> None:
    cast = weight_cast(weight_of((144, 160)), linear_format("fp8-dynamic"))
    assert cast.in_blocks().scale.shape == (2, 2)
    assert torch.equal(cast.in_blocks().dequantised(), cast.dequantised())
    rows = weight_cast(weight_of((144, 160)), linear_format("fp8-rowwise"))
    with pytest.raises(ValueError, match="scaled must be 'tensor' or 'block', got 'row'"):
        rows.in_blocks()


@pytest.mark.parametrize("format", ["fp8-dynamic", "fp8-rowwise", "fp8-block"])
def test_what_is_not_finite_is_seen(format: str) -> None:
    weight = weight_of((144, 160))
    weight[3, 5] = torch.inf
    assert weight_cast(weight, linear_format(format)).dequantised()[3, 5].isnan()
    empty = weight_cast(torch.zeros(16, 16), linear_format(format))
    assert not empty.dequantised().any()


@pytest.mark.parametrize("format", ["mxfp8", "nvfp4", "e4m3", "bf16"])
def test_formats_without(format: str) -> None:
    assert scaled_by(linear_format(format)) is None
    with pytest.raises(ValueError, match="has no cast of the weight: "):
        weight_cast(weight_of((32, 32)), linear_format(format))
