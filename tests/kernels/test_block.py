"""BlockKernel: each product against float64 per block, accuracy, and inputs of every kind."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_fp.kernels import MX_EMULATION, BlockKernel, Kernel, NativeKernel, hardware
from lightning_fp.kernels.block import Scales
from lightning_fp.kernels.block_products import _on_tensor_cores
from tests.helper import kept_bytes, saved_tensors, sqnr_db
from tests.kernels.cuda_rules import CudaRules, on_hardware
from tests.kernels.quantised import rounded

BLOCK = BlockKernel()
POWERS = BlockKernel(scales="power_of_two")
KERNELS = {"block": BLOCK, "powers": POWERS, "mx": MX_EMULATION}
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def operands(tokens: int, inputs: int, outputs: int, seed: int = 0) -> list[Tensor]:
    """x, weight, bias and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, inputs), (outputs, inputs), (outputs,), (tokens, outputs)
    sizes = 1.0, 0.05, 1.0, 1e-4
    return [
        torch.randn(shape, generator=generator) * size
        for shape, size in zip(shapes, sizes, strict=True)
    ]


def run(kernel: Kernel | None, tensors: list[Tensor], compiled: bool = False) -> list[Tensor]:
    """Output and the gradients of x, weight and bias; of nn.Linear without a kernel."""
    x, weight, bias = (tensor.clone().requires_grad_() for tensor in tensors[:3])

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias) if kernel is None else kernel(x, weight, bias, "layer")

    if compiled:
        forward = torch.compile(forward, backend="aot_eager", fullgraph=True)
    output = forward(x, weight, bias)
    output.backward(tensors[3])
    return [output.detach(), *(leaf.grad for leaf in (x, weight, bias))]  # pyright: ignore


# -- the products, exactly ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(256, 128, 128), (150, 200, 72), (1, 33, 5)])
@kernels
def test_each_product_is_that_of_its_operands_cast_in_blocks(
    kernel: BlockKernel, shape: tuple[int, int, int]
) -> None:
    x, weight, bias, g = operands(*shape)
    n, scales = kernel.length, kernel.scales
    square = (n, n)
    forward_w, backward_w = (square, square) if kernel.square_weight else ((1, n), (n, 1))
    expected = [
        rounded(x, (1, n), scales) @ rounded(weight, forward_w, scales).T + bias.double(),
        rounded(g, (1, n), scales) @ rounded(weight, backward_w, scales),
        rounded(g, (n, 1), scales).T @ rounded(x, (n, 1), scales),
        g.double().sum(0),
    ]
    for result, exact in zip(run(kernel, [x, weight, bias, g]), expected, strict=True):
        # What is left is the rounding of float32 sums (of at most 256 terms) and of operands.
        error = (result.double() - exact).abs().max() / exact.abs().max()
        assert error < 2e-6


@kernels
def test_a_gradient_in_high_precision_is_exact(kernel: BlockKernel) -> None:
    tensors = operands(70, 48, 40)
    high = dataclasses.replace(kernel, high_grad_weight=True)
    results, exact, plain = run(high, tensors), run(None, tensors), run(kernel, tensors)
    torch.testing.assert_close(results[2], exact[2])
    assert torch.equal(results[0], plain[0])
    assert torch.equal(results[1], plain[1])


# -- accuracy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kernels
def test_accuracy_on_normal_values(kernel: BlockKernel, dtype: torch.dtype) -> None:
    tensors = [tensor.to(dtype) for tensor in operands(256, 384, 192)]
    exact = run(None, [tensor.double() for tensor in tensors])
    for result, right in zip(run(kernel, tensors), exact[:3], strict=False):
        assert result.dtype is dtype
        assert sqnr_db(right, result) > 28


@pytest.mark.parametrize("where", ["token", "feature"])
@kernels
def test_outliers_harm_only_their_blocks(kernel: BlockKernel, where: str) -> None:
    tensors = operands(256, 384, 256)
    x, _, bias, g = tensors
    bias.zero_()
    index = (7,) if where == "token" else (slice(None), 7)
    x[index] *= 1e6
    g[index] *= 1e6
    exact = run(None, [tensor.double() for tensor in tensors])

    def least(kernel: Kernel) -> float:
        """SQNR of what no outlier took part in: other tokens, or the weight's other features."""
        output, _, grad_weight, _ = run(kernel, tensors)
        if where == "token":
            return sqnr_db(exact[0][8:], output[8:])
        rest = torch.arange(384) >= 128, torch.arange(256) >= 128
        return sqnr_db(exact[2][rest[1]][:, rest[0]], grad_weight[rest[1]][:, rest[0]])

    assert least(kernel) > 28
    assert least(NativeKernel()) < 10, "the outliers of this test do not harm a scale per tensor"


# -- laws -----------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(-20, 20), st.integers(-20, 20), st.sampled_from(sorted(KERNELS)))
def test_powers_of_two_pass_through(of_x: int, of_g: int, name: str) -> None:
    x, weight, bias, g = operands(40, 160, 24)
    bias.zero_()
    output, grad_x, grad_weight, _ = run(KERNELS[name], [x, weight, bias, g])
    scaled = run(KERNELS[name], [x * 2.0**of_x, weight, bias, g * 2.0**of_g])
    assert torch.equal(scaled[0], output * 2.0**of_x)
    assert torch.equal(scaled[1], grad_x * 2.0**of_g)
    assert torch.equal(scaled[2], grad_weight * 2.0 ** (of_x + of_g))


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(3)), st.sampled_from(sorted(KERNELS)))
def test_blocks_can_change_places(order: list[int], name: str) -> None:
    x, weight, _, g = operands(30, 3 * 128, 24)
    features = torch.arange(3 * 128).view(3, 128)[order].flatten()
    output, grad_x, grad_weight, _ = run(KERNELS[name], [x, weight, torch.zeros(24), g])
    moved = run(KERNELS[name], [x[:, features], weight[:, features], torch.zeros(24), g])
    torch.testing.assert_close(moved[0], output)  # the same terms, in another order
    assert torch.equal(moved[1], grad_x[:, features])
    assert torch.equal(moved[2], grad_weight[:, features])


# -- inf and NaN ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@kernels
def test_what_is_not_finite_stays_in_its_block(kernel: BlockKernel, value: float) -> None:
    tensors = operands(256, 256, 256)
    healthy = run(kernel, tensors)
    x, weight, bias, g = (tensor.clone() for tensor in tensors)
    x[3, 5] = value
    output, grad_x, grad_weight, _ = run(kernel, [x, weight, bias, g])
    others = torch.arange(256) != 3
    assert not output[3].isfinite().any()
    assert torch.equal(output[others], healthy[0][others])
    assert torch.equal(grad_x, healthy[1])
    others = torch.arange(256) != 5
    assert not grad_weight[:, 5].isfinite().any()
    assert torch.equal(grad_weight[:, others], healthy[2][:, others])

    weight = tensors[1].clone()
    weight[130, 5] = value
    output = run(kernel, [tensors[0], weight, bias, g])[0]
    harmed = torch.arange(256) >= 128 if kernel.square_weight else torch.arange(256) == 130
    assert not output[:, harmed].isfinite().any()
    assert torch.equal(output[:, ~harmed], healthy[0][:, ~harmed])


# -- inputs of every kind -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 5, 32), (0, 32), (3, 0, 32)])
@kernels
def test_any_leading_dimensions(kernel: BlockKernel, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    output = kernel(x, weight, torch.randn(16), "layer")
    assert output.shape == (*shape[:-1], 16)
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert weight.grad is not None
    assert bool(weight.grad.any()) == bool(x.numel())


@kernels
def test_autocast_decides_the_dtype(kernel: BlockKernel) -> None:
    x, weight, bias, _ = operands(40, 64, 24)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = kernel(x, weight, bias, "layer")
    assert torch.equal(output, kernel(x.bfloat16(), weight, bias, "layer"))
    output.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype is torch.float32


@kernels
def test_only_wanted_gradients_are_computed_and_prepared(kernel: BlockKernel) -> None:
    x, weight, _, g = operands(256, 128, 64)
    weight = torch.nn.Parameter(weight)
    x.requires_grad_()
    with saved_tensors() as kept:
        output = kernel(x, weight, None, "layer")
    scales = 4 / kernel.length * x.numel() + 4
    assert kept_bytes(kept, iter([weight])) <= x.numel() + scales
    output.backward(g)
    expected = [x.grad, weight.grad]

    x.grad, weight.grad = None, None
    weight.requires_grad_(False)
    with saved_tensors() as kept:
        output = kernel(x, weight, None, "layer")
    assert kept_bytes(kept, iter([weight])) <= 4
    output.backward(g)
    assert torch.equal(x.grad, expected[0])  # pyright: ignore
    assert weight.grad is None

    weight.requires_grad_()
    output = kernel(x.detach(), weight, None, "layer")
    output.backward(g)
    assert torch.equal(weight.grad, expected[1])  # pyright: ignore


@pytest.mark.parametrize(
    "kernel", [BLOCK, pytest.param(MX_EMULATION, marks=pytest.mark.slow)], ids=["block", "mx"]
)
def test_compiled_is_eager(kernel: BlockKernel) -> None:
    tensors = operands(40, 136, 24)
    eager, compiled = run(kernel, tensors), run(kernel, tensors, compiled=True)
    for one, other in zip(eager, compiled, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@kernels
def test_compiled_is_eager_for_a_changing_number_of_tokens(kernel: BlockKernel) -> None:
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernel(x, weight, bias, "layer")

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for tokens in (128, 40, 300, 256):
        x, weight, bias, _ = operands(tokens, 136, 24)
        assert torch.equal(compiled(x, weight, bias), forward(x, weight, bias))


def test_bf16_products_are_taken_only_where_they_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "CPU_HAS_BF16", True)
    x = torch.ones(1, dtype=torch.bfloat16)
    assert BLOCK.product_dtype(x) is torch.float32
    assert POWERS.product_dtype(x) is MX_EMULATION.product_dtype(x) is torch.bfloat16
    tensors = [tensor.bfloat16() for tensor in operands(64, 160, 32)]
    fast = run(POWERS, tensors)
    monkeypatch.setattr(hardware, "CPU_HAS_BF16", False)
    for one, other in zip(fast, run(POWERS, tensors), strict=True):
        assert sqnr_db(other, one) > 50  # sums in another order, rounded to bf16


def test_protocol() -> None:
    assert isinstance(BLOCK, Kernel)
    assert BlockKernel() == BLOCK != POWERS
    assert hash(BlockKernel()) == hash(BLOCK)
    assert (BLOCK.name, BLOCK.runs_on_fp8_hardware) == ("native (emulated)", False)


# -- on Hopper's tensor cores ---------------------------------------------------------------------


@pytest.mark.parametrize("scales", ["any", "power_of_two"])
@pytest.mark.parametrize("tokens", [1, 130, 256])
def test_tensor_cores_multiply_the_same_casts(tokens: int, scales: Scales) -> None:
    """Behind CUDA's rules; where the scales are undone alone differs."""
    kernel = BlockKernel(scales=scales)
    tensors = operands(tokens, 384, 640)
    emulated = run(kernel, tensors)
    with CudaRules() as rules:
        found = run(on_hardware(kernel), tensors)
    assert rules.products == 3
    for ours, theirs in zip(found, emulated, strict=True):
        assert sqnr_db(ours, theirs) > 120


def test_tensor_cores_keep_what_is_not_finite_in_its_block() -> None:
    tensors = operands(256, 256, 128)
    tensors[0][200, 10] = math.inf
    with CudaRules():
        output, grad_x, grad_w, _ = run(on_hardware(BLOCK), tensors)
    assert output.isfinite().all(dim=1).sum() == 255
    assert grad_x.isfinite().all()
    assert grad_w.isfinite().all(dim=0).sum() == 255  # one feature, over one block of tokens


def test_tensor_cores_have_a_gradient_in_high_precision_too() -> None:
    tensors = operands(64, 128, 256)
    high = BlockKernel(high_grad_weight=True)
    with CudaRules() as rules:
        found = run(on_hardware(high), tensors)
    assert rules.products == 2
    assert torch.equal(found[2], run(high, tensors)[2])


def test_tensor_cores_take_whole_blocks_of_features() -> None:
    with pytest.raises(ValueError, match="layer 'layer': in_features must be a multiple of 128"):
        on_hardware(BLOCK)(torch.randn(4, 96), torch.randn(128, 96), None, "layer")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "summed", "columns"), [(1, 128, 640), (130, 130, 256)])
@pytest.mark.parametrize("square", [False, True])
def test_torch_takes_the_operands(
    rows: int, summed: int, columns: int, square: bool, dtype: torch.dtype
) -> None:
    """Its own rules for CUDA tensors, which fake ones obey on a machine without a card."""
    blocks, of_b = -(-summed // 128), columns // 128 if square else columns
    with FakeTensorMode(), torch.no_grad():
        a, b = (
            torch.empty(size, summed, dtype=torch.float8_e4m3fn, device="cuda")
            for size in (rows, columns)
        )
        scale_a, scale_b = (torch.empty(n, blocks, device="cuda") for n in (rows, of_b))
        product = _on_tensor_cores(a, scale_a, b, scale_b, dtype, square=square)
    assert (product.shape, product.dtype) == ((rows, columns), dtype)


def test_what_zeros_cost_is_counted() -> None:
    card = BlockKernel(cuda_fp8=True)
    assert card.padding(128, 256, 384) == 0
    assert card.padding(130, 256, 384) == 2 * (2 * 2 + 126) * 256 * 384
    assert BLOCK.padding(130, 256, 384) == 0
    with pytest.raises(ValueError, match="cuda_fp8 must be False for blocks of 32"):
        dataclasses.replace(MX_EMULATION, cuda_fp8=True)
