"""NativeKernel: accuracy, what it keeps for backward, and inputs of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_fp.kernels import Kernel, NativeKernel, TorchaoKernel, hardware
from lightning_fp.kernels.torchao import import_float8
from lightning_fp.numerics import FORMATS
from tests.helper import kept_bytes, saved_tensors, sqnr_db

NATIVE = NativeKernel()
TOKENS, IN, OUT = 192, 128, 64


def operands(dtype: torch.dtype, *, requires_grad: bool = True) -> list[Tensor]:
    """x [TOKENS, IN], weight [OUT, IN], bias [OUT], gradient [TOKENS, OUT]."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        tensor = torch.randn(*shape, generator=generator) * scale
        return tensor.to(dtype).requires_grad_(requires_grad)

    return [
        normal(TOKENS, IN),
        normal(OUT, IN, scale=0.05),
        normal(OUT),
        normal(TOKENS, OUT, scale=1e-4).detach(),
    ]


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def run(
    kernel: Kernel,
    tensors: list[Tensor],
    *,
    autocast_to: torch.dtype | None = None,
    compiled: str | None = None,
) -> tuple[Tensor, ...]:
    """Output and the gradients of x, weight and bias."""
    x, weight, bias, gradient = (t.detach().clone() for t in tensors)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernel(x, weight, bias, "layer")

    if compiled is not None:
        forward = torch.compile(forward, backend=compiled, fullgraph=True)
    with autocast(autocast_to):
        output = forward(x, weight, bias)
    output.backward(gradient.to(output.dtype))
    return output.detach(), x.grad, weight.grad, bias.grad  # pyright: ignore


def reference(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return run_linear([tensor.detach().double() for tensor in tensors])


def run_linear(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    x, weight, bias, gradient = (t.detach().clone() for t in tensors)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    output = F.linear(x, weight, bias)
    output.backward(gradient)
    return output.detach(), x.grad, weight.grad, bias.grad  # pyright: ignore


def torchao_tensorwise() -> TorchaoKernel:
    return TorchaoKernel(config=import_float8().Float8LinearConfig.from_recipe_name("tensorwise"))


# -- accuracy ---------------------------------------------------------------------------------


def accuracy_cases() -> Iterator[Any]:
    """Inductor takes ten seconds and more for each: they are slow."""
    for dtype, autocast_to, compiled, fast_bf16 in product(
        (torch.bfloat16, torch.float32), (None, torch.bfloat16), (None, "inductor"), (True, False)
    ):
        names = (
            "bf16" if dtype is torch.bfloat16 else "fp32",
            "autocast" if autocast_to else "plain",
            "compiled" if compiled else "eager",
            "bf16_gemm" if fast_bf16 else "fp32_gemm",
        )
        marks = [pytest.mark.slow] if compiled else []
        yield pytest.param(dtype, autocast_to, compiled, fast_bf16, id="-".join(names), marks=marks)


@pytest.mark.parametrize(("dtype", "autocast_to", "compiled", "fast_bf16"), list(accuracy_cases()))
def test_accuracy(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    autocast_to: torch.dtype | None,
    compiled: str | None,
    fast_bf16: bool,
) -> None:
    monkeypatch.setattr(hardware, "CPU_HAS_BF16", fast_bf16)
    tensors = operands(dtype)
    results = run(NATIVE, tensors, autocast_to=autocast_to, compiled=compiled)
    theirs = run(torchao_tensorwise(), tensors, autocast_to=autocast_to)
    expected = reference(tensors)
    for name, least, ours, other, right in zip(
        ("output", "dx", "dW"), (25, 22, 22), results, theirs, expected, strict=False
    ):
        db, their_db = sqnr_db(right, ours), sqnr_db(right, other)
        assert db >= least, name
        assert db >= their_db - 0.3, f"{name}: torchao has {their_db}"
        assert ours.dtype is other.dtype, name
    torch.testing.assert_close(results[3], theirs[3], rtol=1e-2, atol=1e-6)
    if compiled is not None:
        eager = run(NATIVE, tensors, autocast_to=autocast_to)
        # Inductor leaves out bf16 roundings in between (in front of a cast to FP8, before a bias,
        # before a cast back to float32): a few values round to the other neighbour.
        for name, one, other in zip(("output", "dx", "dW"), results, eager, strict=False):
            assert sqnr_db(one, other) > 35, f"{name}: compiled is not eager"


@pytest.mark.parametrize("fast_bf16", [True, False], ids=["bf16_gemm", "fp32_gemm"])
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_compiled_product_is_the_eager_one(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, backend: str, fast_bf16: bool
) -> None:
    monkeypatch.setattr(hardware, "CPU_HAS_BF16", fast_bf16)

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        return NATIVE(x, weight, None, "layer")

    x, weight, _, _ = operands(dtype)
    compiled = torch.compile(multiply, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x, weight), multiply(x, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_emulation_dtypes_agree(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    tensors, results = operands(dtype), []
    for fast in (True, False):
        monkeypatch.setattr(hardware, "CPU_HAS_BF16", fast)
        results.append(run(NATIVE, tensors))
    for one, other in zip(*results, strict=True):
        assert sqnr_db(one, other) > 45  # the rounding of one bf16 result


def test_scaling_makes_magnitudes_irrelevant() -> None:
    tensors = operands(torch.float32)
    shifted = [t * f for t, f in zip(tensors, (2.0**20, 2.0**-12, 2.0**8, 2.0**-10), strict=True)]
    one, other = run(NATIVE, tensors), run(NATIVE, shifted)
    for name, a, b, factor in zip(
        ("output", "dx", "dW"), one, other, (2.0**8, 2.0**-22, 2.0**10), strict=False
    ):
        torch.testing.assert_close(a * factor, b, rtol=1e-5, atol=0.0, msg=name)


@pytest.mark.parametrize(
    "formats",
    [
        ("e4m3", "e4m3", "e4m3"),
        ("e5m2", "e4m3", "e5m2"),
        ("e4m3fnuz", "e4m3fnuz", "e5m2fnuz"),
        ("e5m2fnuz", "e5m2fnuz", "e4m3fnuz"),
    ],
    ids="-".join,
)
def test_other_formats(formats: tuple[str, str, str]) -> None:
    kernel = NativeKernel(
        **dict(zip(("input", "weight", "grad_output"), map(FORMATS.get, formats), strict=True))
    )
    tensors = operands(torch.float32)
    results, expected = run(kernel, tensors), reference(tensors)
    compiled = run(kernel, tensors, compiled="aot_eager")
    # Two mantissa bits less in one operand cost about 6 dB.
    least = 25 - 6 * sum(format.startswith("e5m2") for format in formats[:2])
    assert sqnr_db(expected[0], results[0]) > least
    for one, other, right in zip(results[:3], compiled[:3], expected, strict=False):
        assert torch.equal(one, other)
        assert sqnr_db(right, one) > 15


def test_high_grad_weight() -> None:
    tensors = operands(torch.float32)
    low, high = run(NATIVE, tensors), run(NativeKernel(high_grad_weight=True), tensors)
    assert torch.equal(low[0], high[0])
    assert torch.equal(low[1], high[1])
    assert torch.equal(high[2], run_linear(tensors)[2])


# -- what is kept for backward ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("needs_weight", [True, False])
@pytest.mark.parametrize("needs_input", [True, False])
def test_only_what_backward_needs_is_kept(
    needs_input: bool, needs_weight: bool, dtype: torch.dtype
) -> None:
    x, weight, _, gradient = operands(dtype)
    x.requires_grad_(needs_input)
    weight.requires_grad_(needs_weight)
    with saved_tensors() as kept:
        output = NATIVE(x, weight, None, "layer")
    assert output.requires_grad == (needs_input or needs_weight)
    fp8 = [tensor for tensor in kept if tensor.dtype is torch.float8_e4m3fn]
    parameters = [tensor for tensor in kept if tensor is weight]
    scalars = [tensor for tensor in kept if tensor.numel() == 1]
    assert len(fp8) == needs_weight
    assert len(parameters) == needs_input
    assert len(kept) == len(fp8) + len(parameters) + len(scalars)
    if fp8:
        assert fp8[0].shape == x.shape
        assert fp8[0].untyped_storage().nbytes() == x.numel()
    if output.requires_grad:
        output.backward(gradient)
        expected = run(NATIVE, operands(dtype))
        assert (x.grad is not None) == needs_input
        assert (weight.grad is not None) == needs_weight
        assert x.grad is None or torch.equal(x.grad, expected[1])
        assert weight.grad is None or torch.equal(weight.grad, expected[2])


def test_high_grad_weight_keeps_the_input_itself() -> None:
    x, weight, _, _ = operands(torch.bfloat16)
    with saved_tensors() as kept:
        NativeKernel(high_grad_weight=True)(x, weight, None, "layer")
    assert any(t.data_ptr() == x.data_ptr() and t.dtype is x.dtype for t in kept)
    assert not any(t.dtype is torch.float8_e4m3fn for t in kept)


def test_two_chained_linears_keep_half_of_what_torchao_keeps() -> None:
    def kept_by(kernel: Kernel) -> int:
        x, w1, w2 = (
            torch.randn(shape).bfloat16().requires_grad_()
            for shape in ((512, 64), (256, 64), (64, 256))
        )
        with saved_tensors() as kept:
            kernel(kernel(x, w1, None, "one"), w2, None, "two")
        return kept_bytes(kept, iter((w1, w2)))  # pyright: ignore

    ours, theirs = kept_by(NATIVE), kept_by(torchao_tensorwise())
    assert theirs >= 2 * 512 * (64 + 256)
    assert ours <= 0.55 * theirs


# -- inputs of every kind -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 32), (4, 0, 32), (0, 4, 32)])
def test_empty_inputs_run_forward_and_backward(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    weight, bias = torch.randn(16, 32, requires_grad=True), torch.randn(16, requires_grad=True)
    output = NATIVE(x, weight, bias, "layer")
    assert output.shape == (*shape[:-1], 16)
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 5, 32), (2, 3, 5, 32), (1, 1, 1, 1, 32)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(shape, requires_grad=True), torch.randn(16, 32), torch.randn(16)
    output = NATIVE(x, weight, bias, "layer")
    assert output.shape == (*shape[:-1], 16)
    flat = NATIVE(x.detach().reshape(-1, 32), weight, bias, "layer")
    assert torch.equal(output.flatten(), flat.flatten())
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


def test_non_contiguous_inputs_and_gradients() -> None:
    x, weight, _, gradient = operands(torch.float32)
    expected = run(NATIVE, [x, weight, torch.zeros(OUT), gradient])
    transposed = x.detach().t().contiguous().t().requires_grad_()
    output = NATIVE(transposed, weight, None, "layer")
    output.backward(gradient.t().contiguous().t())
    assert torch.equal(output, expected[0])
    assert transposed.grad is not None
    assert torch.equal(transposed.grad, expected[1])
    # the gradient of a sum is one value, expanded
    NATIVE(transposed, weight, None, "layer").sum().backward()


def test_unaligned_shapes_run_under_emulation() -> None:
    x, weight = torch.randn(7, 13, requires_grad=True), torch.randn(5, 13, requires_grad=True)
    output = NativeKernel(cuda_fp8=True)(x, weight, None, "layer")  # the CPU always emulates
    output.sum().backward()
    assert sqnr_db(F.linear(x, weight), output) > 20


def test_inputs_are_not_changed_in_place() -> None:
    tensors = operands(torch.float32)
    before = [tensor.detach().clone() for tensor in tensors]
    x, weight, bias, gradient = tensors
    NATIVE(x, weight, bias, "layer").backward(gradient)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("compiled", [None, "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_to", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, autocast_to: torch.dtype, compiled: str | None) -> None:
    tensors = operands(dtype)
    output, dx, dw, db = run(NATIVE, tensors, autocast_to=autocast_to, compiled=compiled)
    assert output.dtype is autocast_to
    assert dx.dtype is dw.dtype is db.dtype is dtype
    expected = reference(tensors)
    assert sqnr_db(expected[0], output) > 25
    assert sqnr_db(expected[1], dx) > 18  # fp16 gradients of 1e-4 underflow a little
    assert sqnr_db(expected[2], dw) > 18


@pytest.mark.parametrize("compiled", [None, "aot_eager"])
def test_backward_inside_autocast(compiled: str | None) -> None:
    tensors = operands(torch.float32)
    outside = run(NATIVE, tensors, autocast_to=torch.bfloat16, compiled=compiled)
    x, weight, bias, gradient = (t.detach().clone().requires_grad_() for t in tensors)

    def forward(x: Tensor) -> Tensor:
        return NATIVE(x, weight, bias, "layer")

    if compiled:
        forward = torch.compile(forward, backend=compiled, fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        forward(x).backward(gradient.detach().bfloat16())
    for one, other in zip((x.grad, weight.grad, bias.grad), outside[1:], strict=True):
        assert one is not None
        assert torch.equal(one, other)


def test_float64_is_computed_in_float32() -> None:
    tensors = operands(torch.float64)
    results = run(NATIVE, tensors)
    assert all(result.dtype is torch.float64 for result in results)
    assert sqnr_db(reference(tensors)[0], results[0]) > 25


# -- non-finite values -----------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [None, "aot_eager"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["x", "weight"])
def test_a_non_finite_operand_makes_the_whole_output_nan(
    which: str, value: float, compiled: str | None
) -> None:
    tensors = operands(torch.bfloat16)
    with torch.no_grad():
        tensors[which == "weight"][3, 5] = value
    output, dx, dw, db = run(NATIVE, tensors, compiled=compiled)
    assert output.isnan().all()
    # The gradient of the other operand has it too, its own does not.
    hurt, whole = (dw, dx) if which == "x" else (dx, dw)
    assert hurt.isnan().all()
    assert whole.isfinite().all()
    assert db.isfinite().all()


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_non_finite_gradient_is_never_hidden(value: float, high: bool) -> None:
    tensors = operands(torch.bfloat16)
    tensors[3][7, 9] = value
    output, dx, dw, db = run(NativeKernel(high_grad_weight=high), tensors)
    assert output.isfinite().all()
    assert dx.isnan().all()
    assert not dw[9].isfinite().any()
    assert not db[9].isfinite()
    assert dw.isnan().all() or high  # high precision hurts only the row concerned


def test_zeros_give_zeros() -> None:
    tensors = [torch.zeros_like(tensor) for tensor in operands(torch.float32)]
    for result in run(NATIVE, tensors):
        assert not result.any()


def test_tiny_tensors_do_not_turn_nan() -> None:
    tensors = [tensor.detach() * 1e-30 for tensor in operands(torch.float32)]
    for result in run(NATIVE, tensors):
        assert result.isfinite().all()


# -- checkpointing ---------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(32, 64), nn.Linear(64, 32)
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.kernel(x, self.one.weight, self.one.bias, "one"))
        return self.kernel(hidden, self.two.weight, self.two.bias, "two")


@pytest.mark.parametrize("autocast_to", [None, torch.bfloat16])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(
    reentrant: bool, autocast_to: torch.dtype | None
) -> None:
    gradients: list[list[Tensor]] = []
    data = torch.randn(48, 32)
    for checkpointed in (False, True):
        model, x = Mlp(NATIVE), data.clone().requires_grad_()
        with autocast(autocast_to):
            output = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        output.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])  # pyright: ignore
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


# -- the protocol ----------------------------------------------------------------------------------


def test_protocol() -> None:
    kernel = NativeKernel()
    assert isinstance(kernel, Kernel)
    assert kernel == NativeKernel() != NativeKernel(high_grad_weight=True)
    assert hash(kernel) == hash(NativeKernel())
    assert (kernel.name, kernel.runs_on_fp8_hardware) == ("native (emulated)", False)
    on_gpu = NativeKernel(cuda_fp8=True)
    assert (on_gpu.name, on_gpu.runs_on_fp8_hardware) == ("native", True)


def test_double_backward_is_that_of_high_precision() -> None:
    """Until 0.1 it was refused; see `tests/kernels/test_derivatives.py`."""
    seconds = []
    for multiply in (F.linear, lambda x, weight: NATIVE(x, weight, None, "layer")):
        x, weight, _, _ = operands(torch.float32)
        (gradient,) = torch.autograd.grad(multiply(x, weight).square().sum(), x, create_graph=True)
        gradient.sum().backward()
        seconds.append(x.grad)
    assert sqnr_db(*seconds) > 20
