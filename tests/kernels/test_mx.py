"""MXFP8 is torchao's own MXFP8Linear, bit for bit, with and without torchao."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fp.kernels import MX_EMULATION, Kernel, TorchaoMXKernel, mx
from lightning_fp.kernels.quiet import import_quietly
from lightning_fp.layers import kernel_for, linear_format
from tests.helper import order_db, sqnr_db


def run(function: Any, tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients; `tensors` are x, weight, bias and the gradient of the output."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
    output = function(*leaves)
    output.backward(tensors[3])
    return [output.detach(), *(leaf.grad for leaf in leaves)]  # pyright: ignore


def operands(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = (tokens, inputs), (outputs, inputs), (outputs,), (tokens, outputs)
    # Magnitudes over many binades, so that every rounding of the scales occurs.
    return [(torch.randn(s) * torch.exp(3 * torch.randn(s))).to(dtype) for s in shapes]


def layouts_add_alike() -> bool:
    """Whether products in bf16 have the same bits in every layout of their operands."""
    for m, k, n in ((128, 96, 64), (128, 64, 96), (64, 128, 96)):
        a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
        others = a @ b.t().contiguous().t(), a.t().contiguous().t() @ b
        if not all(torch.equal(a @ b, other) for other in others):
            return False
    return True


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ours", ["emulation", "torchao"])
def test_equals_torchaos_own_linear(
    monkeypatch: pytest.MonkeyPatch, ours: str, dtype: torch.dtype, high: bool
) -> None:
    # In bf16 torchao multiplies bf16 with bf16: so do we where that is fast. Elsewhere a product of
    # another layout adds in another order before it is rounded to bf16.
    exact = ours == "torchao" or dtype is torch.float32 or layouts_add_alike()
    monkeypatch.setattr("lightning_fp.kernels.hardware.CPU_HAS_BF16", True)
    module = import_quietly("torchao.prototype.moe_training.mxfp8_linear")
    emulated = module.KernelPreference.EMULATED
    theirs = module.MXFP8Linear(96, 64, kernel_preference=emulated, wgrad_with_hp=high, dtype=dtype)
    backend = "native" if ours == "emulation" else "torchao"
    format = linear_format("mxfp8[grad_weight=high]" if high else "mxfp8")
    kernel = kernel_for(format, backend, cuda_fp8=False)
    assert isinstance(kernel, TorchaoMXKernel) == (ours == "torchao")
    for _ in range(3):
        tensors = operands(128, 96, 64, dtype)
        expected = run(
            lambda x, weight, bias: torch.func.functional_call(
                theirs, {"weight": weight, "bias": bias}, (x,)
            ),
            tensors,
        )
        found = run(lambda *leaves: kernel(*leaves, "layer"), tensors)
        if exact:
            assert same(found, expected)
        else:
            assert all(sqnr_db(a, b) > 45 for a, b in zip(expected, found, strict=True))
    product = kernel(tensors[0], tensors[1], None, "layer")
    once = product + tensors[2]  # the bias
    assert torch.equal(expected[0], once) if exact else sqnr_db(expected[0], once) > 45


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(5, 40, 24), (33, 31, 65), (64, 32, 32)])
def test_ragged_blocks_and_fp16_which_torchao_refuses(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    tensors = [tensor.clamp(-4, 4) for tensor in operands(*shape, dtype)]
    kernel = TorchaoMXKernel()
    ours = run(lambda *leaves: MX_EMULATION(*leaves, "layer"), tensors)
    theirs = run(lambda *leaves: kernel(*leaves, "layer"), tensors)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one, other) or sqnr_db(one, other) > order_db(max(shape))


@pytest.mark.parametrize("shape", [(32,), (2, 3, 32), (0, 32)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = TorchaoMXKernel()(x, weight, torch.randn(16), "layer")
    assert output.shape == (*shape[:-1], 16)
    assert output.dtype is torch.bfloat16
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


def test_compiled_is_eager() -> None:
    tensors, kernel = operands(32, 64, 40, torch.float32), TorchaoMXKernel()

    def forward(*leaves: Tensor) -> Tensor:
        return kernel(*leaves, "layer")

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    # With several threads a float32 GEMM may add in another order from one call to the next.
    for one, other in zip(run(compiled, tensors), run(forward, tensors), strict=True):
        assert torch.equal(one, other) or sqnr_db(one, other) > order_db(64)


def test_protocol() -> None:
    kernel = TorchaoMXKernel()
    assert isinstance(kernel, Kernel)
    assert kernel == TorchaoMXKernel() != TorchaoMXKernel(high_grad_weight=True)
    assert (kernel.name, kernel.runs_on_fp8_hardware) == ("torchao (emulated)", False)
    on_gpu = TorchaoMXKernel(cuda_mx=True)
    assert (on_gpu.name, on_gpu.runs_on_fp8_hardware) == ("torchao", True)
    # CPU tensors are emulated all the same.
    assert on_gpu(torch.randn(4, 32), torch.randn(8, 32), None, "layer").shape == (4, 8)


@pytest.mark.parametrize("what", ["moved", "changed"])
def test_a_torchao_without_the_op_is_named(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    name = "torchao.prototype.moe_training.mxfp8_linear"
    import_quietly(name)
    version = importlib.import_module("torchao").__version__
    # What an import finds where the module is not there, or is another one.
    monkeypatch.setitem(sys.modules, name, None if what == "moved" else ModuleType(name))
    mx._import_mxfp8.cache_clear()
    try:
        with pytest.raises(ValueError, match=rf"torchao 0\.18, this is {version}.*'native'"):
            TorchaoMXKernel()
    finally:
        mx._import_mxfp8.cache_clear()


def test_layers_are_linear_layers_of_torchao_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of torchao is imported to emulate the format."""
    monkeypatch.setattr(mx, "_import_mxfp8", lambda: pytest.fail("torchao was imported"))
    kernel = kernel_for(linear_format("mxfp8"), "auto", cuda_fp8=False)
    linear = nn.Linear(32, 32)
    assert kernel(torch.randn(4, 32), linear.weight, linear.bias, "layer").shape == (4, 32)
