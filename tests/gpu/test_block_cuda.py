"""`fp8-block` on Hopper, by torch's own products. Not run on hardware yet; skips elsewhere."""

from __future__ import annotations

import pytest
import torch

from lightning_fp.kernels import BlockKernel
from lightning_fp.kernels.hardware import cuda_block_refusal
from tests.helper import sqnr_db

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or cuda_block_refusal() is not None,
        reason="products of blocks of 128 need sm90",
    ),
]

CARD, EMULATED = BlockKernel(cuda_fp8=True), BlockKernel()


def run(kernel: BlockKernel, tokens: int, dtype: torch.dtype, compiled: bool) -> list[torch.Tensor]:
    """Output and gradients of the input and the weight."""
    torch.manual_seed(0)
    x = torch.randn(tokens, 512, device="cuda", dtype=dtype, requires_grad=True)
    w = torch.randn(384, 512, device="cuda", dtype=dtype).mul_(0.02).requires_grad_()
    g = torch.randn(tokens, 384, device="cuda", dtype=dtype)

    def multiply(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return kernel(x, w, None, "layer")

    output = (torch.compile(multiply, fullgraph=True) if compiled else multiply)(x, w)
    output.backward(g)
    assert x.grad is not None
    assert w.grad is not None
    return [output, x.grad, w.grad]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 130, 256])
def test_hardware_equals_emulation(tokens: int, dtype: torch.dtype, compiled: bool) -> None:
    """The same casts; tensor cores add up with fewer bits and undo the scales after each block."""
    found = run(CARD, tokens, dtype, compiled)
    expected = run(EMULATED, tokens, dtype, compiled=False)
    for ours, emulated in zip(found, expected, strict=True):
        assert ours.dtype is dtype
        assert sqnr_db(emulated, ours) > 40
