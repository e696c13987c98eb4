"""MXFP8 on the hardware that multiplies it. Not run on hardware yet; skips before sm100."""

from __future__ import annotations

import pytest
import torch

from lightning_fp.kernels import MX_EMULATION, TorchaoMXKernel
from lightning_fp.kernels.hardware import cuda_mx_refusal
from tests.helper import sqnr_db

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or cuda_mx_refusal() is not None,
        reason="MX formats need sm100",
    ),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_hardware_equals_emulation(dtype: torch.dtype) -> None:
    """Same casts, so only the accumulation differs; the op itself is bf16."""
    torch.manual_seed(0)
    results = []
    shapes = (256, 512), (384, 512), (384,), (256, 384)
    tensors = [torch.randn(shape, device="cuda").bfloat16().to(dtype) for shape in shapes]
    for kernel in (TorchaoMXKernel(cuda_mx=True), MX_EMULATION):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
        output = kernel(*leaves, "layer")
        output.backward(tensors[3])
        results.append([output, *(leaf.grad for leaf in leaves)])
    for ours, emulated in zip(*results, strict=True):
        assert ours.dtype is emulated.dtype is dtype
        assert sqnr_db(emulated, ours) > 45  # one rounding to bf16


@pytest.mark.parametrize("tokens", [1, 7, 24, 33, 48])
def test_any_number_of_tokens(tokens: int) -> None:
    torch.manual_seed(0)
    results = []
    for kernel in (TorchaoMXKernel(cuda_mx=True), MX_EMULATION):
        torch.manual_seed(0)
        x = torch.randn(tokens, 64, device="cuda").bfloat16().requires_grad_()
        weight = torch.randn(96, 64, device="cuda").bfloat16().requires_grad_()
        output = kernel(x, weight, None, "layer")
        output.backward(torch.ones_like(output))
        results.append([output, x.grad, weight.grad])
    for ours, emulated in zip(*results, strict=True):
        assert sqnr_db(emulated, ours) > 45


def test_ragged_features_are_refused() -> None:
    x, weight = torch.randn(48, 72, device="cuda"), torch.randn(64, 72, device="cuda")
    with pytest.raises(ValueError, match=r"in_features must be a multiple of 32"):
        TorchaoMXKernel(cuda_mx=True)(x, weight, None, "layer")
