"""Weights cast from their bf16 export: what a kernel makes of the rounded weight, bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fp import FP8Precision, convert
from lightning_fp.kernels import MX_EMULATION, BlockKernel, Kernel, NativeKernel
from lightning_fp.kernels.straight_through import straight_through
from lightning_fp.layers import LinearFormat, kernel_for, linear_format
from lightning_fp.layers.format import NAMED_FORMATS
from lightning_fp.numerics import through_bf16
from lightning_fp.stability.respond.ladder import rungs_above
from tests.helper import LanguageModel, fit, saved_tensors

KERNELS: dict[str, Kernel] = {
    "tensor": NativeKernel(),
    "high grad_weight": NativeKernel(high_grad_weight=True),
    "block": BlockKernel(),
    "powers": BlockKernel(scales="power_of_two"),
    "mx": MX_EMULATION,
    "rows": kernel_for(linear_format("fp8-rowwise"), "auto", cuda_fp8=False),
    "rows, high": kernel_for(linear_format("fp8-rowwise-gw-hp"), "auto", cuda_fp8=False),
    "tensor by powers": kernel_for(
        LinearFormat("dynamic", power_of_two=True), "auto", cuda_fp8=False
    ),
}
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
EXPORTED = [name for name, format in NAMED_FORMATS.items() if format.scaling != "none"]


def exporting(kernel: Any) -> Any:
    return dataclasses.replace(kernel, through_bf16=True)


def run(kernel: Kernel, x: Tensor, weight: Tensor, compiled: str = "") -> list[Tensor]:
    x, weight = (leaf.clone().requires_grad_() for leaf in (x, weight))
    call = torch.compile(kernel, backend=compiled, fullgraph=True) if compiled else kernel
    output = call(x, weight, None, "layer")
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype))
    assert x.grad is not None
    assert weight.grad is not None
    assert weight.grad.dtype == weight.dtype
    return [output.detach(), x.grad, weight.grad]


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 160, generator=generator).to(dtype)
    return x, torch.randn(144, 160, generator=generator) * 0.05


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_kernel_of_the_rounded_weight(kernel: Kernel, dtype: torch.dtype) -> None:
    x, weight = operands(dtype)
    rounded = weight.bfloat16().float()
    for found, expected in zip(
        run(exporting(kernel), x, weight), run(kernel, x, rounded), strict=True
    ):
        assert torch.equal(found, expected)
    # and it is another one than that of the weight itself
    assert not torch.equal(run(kernel, x, weight)[0], run(kernel, x, rounded)[0])


@pytest.mark.parametrize("kernel", [NativeKernel(), BlockKernel()], ids=["tensor", "block"])
def test_compiled_alike(kernel: Kernel) -> None:
    x, weight = operands()
    for found, expected in zip(
        run(exporting(kernel), x, weight, "aot_eager"),
        run(kernel, x, weight.bfloat16().float(), "aot_eager"),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.slow
def test_inductor_does_not_leave_the_rounding_out() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.randint(
        -30, 30, (4096,)
    )
    compiled = torch.compile(lambda x: through_bf16(x).float() * 1.0, fullgraph=True)
    assert torch.equal(compiled(x), x.bfloat16().float())


def test_special_values() -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, largest, 1e-45, 1.00390625])
    compiled = torch.compile(through_bf16, backend="aot_eager")
    torch.testing.assert_close(compiled(x), x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@kernels
def test_the_scale_of_its_statistics_is_that_of_the_cast(kernel: Kernel) -> None:
    _, weight = operands()
    scale, format = exporting(kernel).cast_of(1, weight, None)
    expected, expected_format = kernel.cast_of(1, weight.bfloat16().float(), None)
    assert torch.equal(scale, expected)
    assert format == expected_format


@pytest.mark.parametrize("kernel", [NativeKernel(), BlockKernel()], ids=["tensor", "block"])
def test_under_transforms(kernel: Kernel) -> None:
    x, weight = operands()
    rounded = weight.bfloat16().float()
    for of, w in ((exporting(kernel), weight), (kernel, rounded)):
        found = torch.func.vmap(lambda x, of=of, w=w: straight_through(of, x, w, None))(x)
        expected = torch.func.vmap(lambda x: straight_through(kernel, x, rounded, None))(x)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kernel", [NativeKernel(), BlockKernel()])
def test_backward_keeps_the_parameter_and_no_copy(kernel: Kernel) -> None:
    x, weight = operands()
    weight.requires_grad_()
    with saved_tensors() as saved:
        exporting(kernel)(x.requires_grad_(), weight, None, "layer")
    assert any(tensor.data_ptr() == weight.data_ptr() for tensor in saved)
    assert not any(
        tensor.shape == weight.shape and tensor.data_ptr() != weight.data_ptr() for tensor in saved
    )


class TestFormats:
    @pytest.mark.parametrize("name", EXPORTED)
    def test_names_are_read_back(self, name: str) -> None:
        if name == "nvfp4":
            return
        format = linear_format(f"{name}[quantise_like=bf16-export]")
        assert format.quantise_like == "bf16-export"
        assert linear_format(format.name) == format

    def test_high_precision_casts_nothing(self) -> None:
        with pytest.raises(ValueError, match="quantise_like must be 'master' where nothing is"):
            linear_format("bf16[quantise_like=bf16-export]")
        with pytest.raises(ValueError, match="quantise_like must be one of master, bf16-export"):
            linear_format("fp8-block[quantise_like=bf16]")

    def test_the_ladder_keeps_it(self) -> None:
        model = nn.Sequential(nn.Linear(32, 32))
        table = convert(model, "fp8-delayed", quantise_like="bf16-export").precision_map
        layer = table.layers["0"]
        *rungs, high = rungs_above(layer.format, linear_format("bf16"), table, layer)
        assert len(rungs) == 3
        assert {rung.quantise_like for rung in rungs} == {"bf16-export"}
        assert high.quantise_like == "master"

    def test_of_convert_and_rules(self) -> None:
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
        report = convert(
            model,
            "fp8-dynamic",
            layers={"1": "bf16", "2": "fp8-block"},
            quantise_like="bf16-export",
        )
        assert report.precision_map.formats() == {
            "0": "fp8-dynamic[quantise_like=bf16-export]",
            "1": "bf16",
            "2": "fp8-block[quantise_like=bf16-export]",
        }

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scaling": "auto"}, "quantise_like must be None with scaling 'auto'"),
            ({"backend": "te"}, "transformer-engine' cannot run .* it casts the weight as it is"),
            ({"quantise_like": "bf16"}, "quantise_like must be one of master, bf16-export, got"),
        ],
    )
    def test_refusals(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            FP8Precision(**{"quantise_like": "bf16-export", **options})

    def test_of_frozen_weights(self) -> None:
        model = nn.Sequential(nn.Linear(32, 32)).requires_grad_(False)
        with pytest.raises(ValueError, match=r"frozen must be 'kept' .* from its bf16 export"):
            convert(model, "fp8-dynamic", quantise_like="bf16-export", frozen="stored")

    def test_of_the_plugin(self) -> None:
        """Weights that bf16 holds train alike; others do not."""
        trained = [
            fit(FP8Precision("delayed", quantise_like=like), LanguageModel(), max_steps=3).losses
            for like in (None, "master", "bf16-export")
        ]
        assert trained[0] == trained[1]
        assert trained[0] != trained[2]
