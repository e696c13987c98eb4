"""No number of tokens, dtype or layout of an input ends a run on FP8 hardware."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_fp import convert
from lightning_fp.format_names import TABLE
from lightning_fp.kernels import Kernel, NativeKernel, TorchaoKernel, TorchaoMXKernel
from lightning_fp.kernels.gemm import backward_products, cast_operand, forward_products
from lightning_fp.kernels.padding import whole
from lightning_fp.layers import kernel_for, linear_format
from lightning_fp.layers.conversion.flops import example_flops
from lightning_fp.layers.statistics_table import StatisticsTable
from lightning_fp.numerics import FORMATS
from lightning_fp.records.rows import Sampled, statistics_rows
from tests.helper import sqnr_db
from tests.kernels.cuda_rules import CudaRules, OnHardware, TorchaoOnHardware

FP8_NAMES = [row.name for row in TABLE if row.scaling != "none"]
TOKENS = 1, 7, 24, 33, 40, 64
WIDE, OUT = 64, 48
E4M3, E5M2 = FORMATS["e4m3"], FORMATS["e5m2"]


def gradients(kernel: Kernel, x: Tensor, w: Tensor, g: Tensor) -> list[Tensor]:
    """Output and gradients of a layer."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    output = kernel(x, w, None, "layer")
    output.backward(g)
    assert x.grad is not None
    assert w.grad is not None
    return [output.detach(), x.grad, w.grad]


def operands(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = (tokens, WIDE), (OUT, WIDE), (tokens, OUT)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)  # pyright: ignore


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_hardwares_branch_equals_emulation(tokens: int, dtype: torch.dtype) -> None:
    """The same FP8 operands, so only the order of the sums and the last rounding differ."""
    x, w, g = operands(tokens, dtype)
    with CudaRules() as rules:
        hardware = gradients(OnHardware(cuda_fp8=True), x, w, g)
    emulated = gradients(NativeKernel(), x, w, g)
    assert rules.products == 3
    least = 120 if dtype is torch.float32 else 50
    for found, expected in zip(hardware, emulated, strict=True):
        assert found.dtype is expected.dtype is dtype
        assert sqnr_db(expected, found) > least


@pytest.mark.parametrize("changes", [
    {"grad_output": E4M3}, {"high_grad_weight": True}, {"input": E5M2, "grad_output": E4M3},
], ids=str)  # fmt: skip
def test_other_operands(changes: dict[str, Any]) -> None:
    x, w, g = operands(33)
    with CudaRules():
        hardware = gradients(OnHardware(cuda_fp8=True, **changes), x, w, g)
    for found, expected in zip(hardware, gradients(NativeKernel(**changes), x, w, g), strict=True):
        assert sqnr_db(expected, found) > 120


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded", "3d", "one row of many"])
def test_layouts(layout: str) -> None:
    _, w, _ = operands(1)
    x = {
        "strided": torch.randn(7, 2 * WIDE)[:, ::2],
        "transposed": torch.randn(WIDE, 7).t(),
        "expanded": torch.randn(1, WIDE).expand(7, WIDE),
        "3d": torch.randn(3, 5, WIDE).transpose(0, 1),
        "one row of many": torch.randn(WIDE, 4).t()[1:2],
    }[layout]
    g = torch.randn(OUT, *x.shape[:-1]).movedim(0, -1)
    with CudaRules():
        hardware = gradients(OnHardware(cuda_fp8=True), x, w, g)
    for found, expected in zip(hardware, gradients(NativeKernel(), x, w, g), strict=True):
        assert sqnr_db(expected, found) > 120


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_products_are_those_of_the_operands(tokens: int) -> None:
    """Beside float64 over the same FP8 values; sums in float32 err by their length at most."""
    tensors = operands(tokens)
    casts = [
        cast_operand(tensor, torch.ones(()), format, None)[0]
        for tensor, format in zip(tensors, (E4M3, E4M3, E5M2), strict=True)
    ]
    x, w, g = casts
    one = torch.ones(())
    with CudaRules() as rules:
        output = forward_products(x, w, one, one, torch.float32)
        found = backward_products(g, g, x, w, one, one, one, (torch.float32, torch.float32))
    assert rules.products == 3
    x, w, g = (cast.double() for cast in casts)
    for product, (a, b) in zip((output, *found), ((x, w.t()), (g, w), (g.t(), x)), strict=True):
        assert product is not None
        bound = 2 * a.shape[1] * 2.0**-24 * (a.abs() @ b.abs()) + 1e-30
        assert ((product.double() - a @ b).abs() <= bound).all()


def test_one_graph_serves_all_numbers_of_tokens() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    kernel = OnHardware(cuda_fp8=True)
    _, w, _ = operands(1)
    w.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return kernel(x, w, None, "layer").square().sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for tokens in (24, 33, 64, 7, 48, 1000):
        x, _, _ = operands(tokens)
        torch._dynamo.mark_dynamic(x, 0)
        w.grad = None
        compiled(x).backward()
        found, w.grad = w.grad, None
        loss(x).backward()
        assert found is not None
        assert w.grad is not None
        assert sqnr_db(w.grad, found) > 120
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_torchs_own_rules_for_cuda(tokens: int, dtype: torch.dtype) -> None:
    """Fake tensors follow torch's rules of devices and shapes; without autograd on a CPU build."""
    kernel = NativeKernel(cuda_fp8=True)
    with FakeTensorMode(), torch.no_grad():
        x, w, g = (
            torch.empty(shape, dtype=dtype, device="cuda")
            for shape in ((tokens, WIDE), (OUT, WIDE), (tokens, OUT))
        )
        output = kernel(x, w, None, "layer")
        assert (output.shape, output.dtype, output.device.type) == (g.shape, dtype, "cuda")
        scale = torch.ones((), device="cuda")
        formats = (E4M3, E4M3, E5M2)
        casts = [
            cast_operand(t, scale, format, None)[0]
            for t, format in zip((x, w, g), formats, strict=True)
        ]
        unscaled = scale, scale, scale
        x8, w8, g8 = casts
        found = backward_products(g8, g8, x8, w8, *unscaled, (dtype, torch.float32))
        assert [None if f is None else (f.shape, f.dtype) for f in found] == [
            (x.shape, dtype),
            (w.shape, torch.float32),
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", ["fp8-dynamic", "fp8-rowwise", "fp8-rowwise-gw-hp"])
def test_torchaos_products(format: str, dtype: torch.dtype) -> None:
    """The same rules: any number of tokens, and bf16 is what products by row return."""
    emulated = kernel_for(linear_format(format), "torchao", cuda_fp8=False)
    assert isinstance(emulated, TorchaoKernel)
    # By row operands are rounded to bf16 before they are cast, where they have more.
    least = 40 if format == "fp8-dynamic" or dtype is torch.bfloat16 else 30
    hardware = TorchaoOnHardware(config=emulated.config, cuda_fp8=True)
    for tokens in (1, 7, 24, 64):
        x, w, g = operands(tokens, dtype)
        with CudaRules() as rules:
            found = gradients(hardware, x, w, g)
        assert rules.products == (2 if format.endswith("hp") else 3)
        for ours, expected in zip(found, gradients(emulated, x, w, g), strict=True):
            assert ours.dtype is dtype
            assert sqnr_db(expected, ours) > least


def test_features_that_hardware_does_not_have_are_refused_by_name() -> None:
    kernel = dataclasses.replace(OnHardware(cuda_fp8=True))
    with pytest.raises(ValueError, match="layer 'up': in_features must be a multiple of 16"):
        kernel(torch.randn(16, 40), torch.randn(16, 40), None, "up")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_padding_is_zeros_and_nothing_else(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7).to(dtype)
    padded = whole(x, rows=8, columns=16)
    assert (padded.shape, padded.dtype) == ((8, 16), dtype)
    assert padded.is_contiguous()
    assert torch.equal(padded[:5, :7].float(), x.float())
    assert padded.float().abs().sum() == x.float().abs().sum()
    assert torch.equal(whole(x.t(), columns=5).float(), x.t().float())


@pytest.mark.parametrize("format", [name for name in FP8_NAMES if name != "nvfp4"])
def test_every_format_takes_them_under_emulation(format: str) -> None:
    model = nn.Sequential(nn.Linear(48, 80), nn.GELU(), nn.Linear(80, 32))
    table = convert(model, format, layers={"*": format}).precision_map
    for tokens in TOKENS:
        x = torch.randn(tokens, 48, requires_grad=True)
        model(x).square().mean().backward()
        table.step()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()


KERNELS: dict[str, Kernel] = {
    "native": NativeKernel(cuda_fp8=True),
    "native, grad_weight high": NativeKernel(cuda_fp8=True, high_grad_weight=True),
    "native, emulated": NativeKernel(),
    "rowwise": kernel_for(linear_format("fp8-rowwise"), "auto", cuda_fp8=True),
    "rowwise-gw-hp": kernel_for(linear_format("fp8-rowwise-gw-hp"), "auto", cuda_fp8=True),
    "rowwise, emulated": kernel_for(linear_format("fp8-rowwise"), "auto", cuda_fp8=False),
    "mxfp8": TorchaoMXKernel(cuda_mx=True),
    "mxfp8, emulated": TorchaoMXKernel(),
}
ROWS = {"native": (16, 1), "rowwise": (16, 1), "mxfp8": (32, 3)}
"""What tokens are filled up to, and in how many products; the others fill up nothing."""


@pytest.mark.parametrize("tokens", [1, 7, 24, 32, 33])
@pytest.mark.parametrize("name", KERNELS)
def test_what_zeros_cost_is_known(name: str, tokens: int) -> None:
    multiple, products = ROWS.get(name, (1, 0))
    zeros = -tokens % multiple * products
    assert KERNELS[name].padding(tokens, WIDE, OUT) == 2 * zeros * WIDE * OUT


def test_the_zeros_are_those_that_are_multiplied() -> None:
    """Beside the shapes that reach `torch._scaled_mm`."""
    kernel = OnHardware(cuda_fp8=True)
    for tokens in TOKENS:
        with CudaRules() as rules:
            gradients(kernel, *operands(tokens))
        spent = sum(2 * m * k * n for m, k, n in rules.shapes)
        assert spent - 3 * 2 * tokens * WIDE * OUT == kernel.padding(tokens, WIDE, OUT)


def test_torchaos_zeros_are_those_that_are_multiplied() -> None:
    """With features filled up as well, as its config may say."""
    emulated = kernel_for(linear_format("fp8-dynamic"), "torchao", cuda_fp8=False)
    assert isinstance(emulated, TorchaoKernel)
    config = dataclasses.replace(emulated.config, pad_inner_dim=True)
    kernel = TorchaoOnHardware(config=config, cuda_fp8=True)
    x, w, g = torch.randn(32, 40), torch.randn(48, 40), torch.randn(32, 48)
    with CudaRules() as rules, contextlib.suppress(AssertionError):
        gradients(kernel, x, w, g)
    assert rules.shapes[0] == (32, 48, 48)  # 40 features, filled up to 48
    assert kernel.padding(32, 40, 48) == 2 * 32 * 48 * 8


def test_the_cost_of_zeros_is_shown() -> None:
    """From an example before the run, and by the statistics of the steps that ran."""
    model = nn.Sequential(nn.Linear(WIDE, OUT), nn.GELU(), nn.Linear(OUT, WIDE, bias=False))
    report = convert(model, "fp8-dynamic", {"0": "fp8-dynamic", "2": "bf16"})
    table = report.precision_map
    layer = table.layers["0"]
    layer.switch(layer.format, OnHardware(cuda_fp8=True))

    for tokens, share in ((1, 15 / 18), (24, 8 / 80), (48, 0.0), (1602, 14 / 4820)):
        told = report.with_flops(*example_flops(model, torch.randn(tokens, WIDE)))
        assert [row.padding for row in told.layers] == pytest.approx([share, 0.0])
        assert told.padding == pytest.approx(share)
        assert ("zeros that fill up blocks" in told.summary()) is (share > 0.01)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        run = torch.compile(model, backend=counter) if compiled else model
        statistics = StatisticsTable(dict(table.layers))
        statistics.collect(True)
        for tokens in (24, 33, 17):
            x = torch.randn(tokens, WIDE)
            torch._dynamo.mark_dynamic(x, 0)
            run(x).sum().backward()
            statistics.fold()
        sampled = Sampled(
            layers=["0", "2"],
            formats=statistics.formats(),
            values=statistics.take(),
            steps=torch.ones(2, dtype=torch.int64),
        )
        rows = statistics_rows([sampled], table.scale_history.take_amax_record())
        shares = rows.values["padding_fraction"]
        known = {rows.operands[i]: float(s) for i, s in enumerate(shares) if not s.isnan()}
        assert known == {"input": pytest.approx((8 + 15 + 15) / (3 * 74 + 8 + 15 + 15))}
        assert rows.padding_fraction == pytest.approx(38 / 260)
        statistics.close()
    assert counter.frame_count == 1  # whatever the number of tokens
