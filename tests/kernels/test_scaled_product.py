"""Scaled simulated formats multiply their rounded values in bf16, and undo the scales once."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning_fp import convert
from lightning_fp.format_names import Rounding
from lightning_fp.kernels import SimulatedKernel
from lightning_fp.numerics import float_format, round_to_format
from tests.helper import kept_bytes, saved_tensors, sqnr_db
from tests.kernels.quantised import Product

Products = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _fast_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_fp.kernels.hardware.CPU_HAS_BF16", True)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it has operands divided by their scales and multiplied in float32 from then on."""

    def switch() -> None:
        monkeypatch.setattr(SimulatedKernel, "multiplies_scaled", lambda *_: False)

    return switch


def scaled(name: str, rounding: Rounding = "nearest", **options: Any) -> SimulatedKernel:
    format = float_format(name)
    formats = {"input": format, "weight": format, "grad_output": format}
    return SimulatedKernel(**{**formats, "rounding": rounding, "scaled": True, **options})


def operands(weight_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and gradient of the output, each of a size of its own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 64, generator=generator).bfloat16()
    weight = 0.02 * torch.randn(48, 64, generator=generator).to(weight_dtype)
    g = 1e-6 * torch.randn(2, 40, 48, generator=generator).bfloat16()
    return x.requires_grad_(), weight.requires_grad_(), g


def found(
    kernel: SimulatedKernel, operands: tuple[Tensor, Tensor, Tensor], compiled: bool = False
) -> list[Tensor]:
    """Output and both gradients, from one state of torch's generator."""

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return kernel(x, weight, None, "layer")

    if compiled:
        torch._dynamo.reset()
        forward = torch.compile(forward, backend="aot_eager", fullgraph=True)
    x, weight, g = operands
    torch.manual_seed(3)
    output = forward(x, weight)
    return [output.detach(), *torch.autograd.grad(output, [x, weight], g)]


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("name", ["e4m5", "e7m7", "e5m2", "e2m1"])
def test_products_of_the_rounded_operands_are_rounded_once(
    name: str, rounding: Rounding, weight_dtype: torch.dtype, in_float32: Callable[[], None]
) -> None:
    """e7's values alone would overflow float32 in a product."""
    kernel = scaled(name, rounding)
    given = operands(weight_dtype)

    def exact(operand: int, x: Tensor) -> Tensor:
        scale, format = kernel.cast_of(operand, x.detach(), None)
        rounded = round_to_format(x.detach().float() * scale, format, rounding)
        return (rounded.double() / scale.double()).flatten(0, -2)

    x, w, g = (exact(operand, each) for operand, each in enumerate(given))
    expected = Product(x, w.t()), Product(g, w), Product(g.t(), x)
    ours = found(kernel, given)
    in_float32()
    divided = found(kernel, given)
    dtypes = torch.bfloat16, torch.bfloat16, weight_dtype
    for product, one, other, dtype in zip(expected, ours, divided, dtypes, strict=True):
        assert one.dtype is other.dtype is dtype
        rows = one.flatten(0, -2)
        rounded = dtype is torch.bfloat16
        assert product.excess(rows, dtype, 1 if rounded else 0) <= 1
        reference = product.a @ product.b
        least = sqnr_db(reference, other.flatten(0, -2))
        assert sqnr_db(reference, rows) > least - (0.05 if rounded else 0)


def test_which_products_are_made_so() -> None:
    x, weight, _ = operands()
    assert scaled("e4m5").multiplies_scaled(x, weight)
    assert not scaled("e4m8").multiplies_scaled(x, weight)
    assert not scaled("e4m5", power_of_two=True).multiplies_scaled(x, weight)
    assert not scaled("e4m5", scaled=False).multiplies_scaled(x, weight)
    assert not scaled("e4m5").multiplies_scaled(x.float(), weight)
    assert not scaled("e4m5").multiplies_scaled(x[:0], weight)
    empty = scaled("e4m5")(x[:0], weight, None, "layer")
    assert empty.shape == (0, 40, 48)


@pytest.mark.parametrize("operand", [0, 1, 2])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_non_finite_operands_show(
    operand: int, value: float, in_float32: Callable[[], None]
) -> None:
    given = operands()
    with torch.no_grad():
        given[operand].view(-1)[5] = value
    ours = found(scaled("e4m5"), given)
    in_float32()
    for one, other in zip(ours, found(scaled("e4m5"), given), strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())
    assert sum(one.isnan().all().item() for one in ours) >= 2


def test_the_bias_is_added_in_full() -> None:
    x, weight, g = operands()
    bias = torch.randn(48, requires_grad=True)
    output = scaled("e4m5")(x, weight, bias, "layer")
    without = scaled("e4m5")(x, weight, None, "layer")
    assert torch.equal(output, without + bias.bfloat16())
    output.backward(g)
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, g.float().sum((0, 1)), rtol=1e-2, atol=1e-8)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_operand_has_no_gradient(frozen: int) -> None:
    given = operands()
    expected = found(scaled("e4m5"), given)[2 - frozen]
    given[frozen].requires_grad_(False)
    with saved_tensors() as kept:
        output = scaled("e4m5")(given[0], given[1], None, "layer")
    assert kept_bytes(kept, iter(())) <= (2 * 80 * 64 if frozen == 0 else 4 * 48 * 64) + 100
    assert torch.equal(torch.autograd.grad(output, given[1 - frozen], given[2])[0], expected)
    assert given[frozen].grad is None


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_compiled_is_eager_bit_for_bit(rounding: Rounding) -> None:
    kernel = scaled("e4m5", rounding)
    eager, compiled = (found(kernel, operands(), compiled) for compiled in (False, True))
    for one, other in zip(eager, compiled, strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------ what is kept


def test_the_rounded_input_and_the_parameter_are_kept() -> None:
    """As FSDP2 wants it: a cast would keep the unsharded weight alive until backward."""
    model = nn.Sequential(nn.Linear(64, 512, bias=False))
    convert(model, "high", {"*": "e4m5-scaled"})
    with saved_tensors() as kept:
        model(torch.randn(8, 64).bfloat16().requires_grad_())
    assert kept_bytes(kept, model.parameters()) < 8 * 64 * 2 + 100


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or sys.platform != "linux", reason="needs gloo")
@pytest.mark.usefixtures("one_rank")
def test_fsdp2_has_the_same_gradients() -> None:
    plain = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32))
    sharded = copy.deepcopy(plain)
    for model in (plain, sharded):
        convert(model, "high", {"*": "e4m5-scaled"})
    mesh = init_device_mesh("cpu", (1,))
    for layer in (*sharded, sharded):
        fully_shard(layer, mesh=mesh)
    x = torch.randn(24, 64)
    for model in (plain, sharded):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        output.float().square().sum().backward()
    for one, other in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad.full_tensor())


# ------------------------------------------------------------------ by chance


def test_forward_and_backward_round_the_weight_alike() -> None:
    kernel = scaled("e4m2", "stochastic")
    eye = torch.eye(32).bfloat16().requires_grad_()  # 0 and the amax are values of the format
    weight = torch.randn(16, 32)
    output = kernel(eye, weight, None, "layer")
    output.backward(torch.eye(32)[:, :16].bfloat16())
    assert torch.equal(eye.grad[:16], output.detach().t())
    assert not torch.equal(kernel(eye, weight, None, "layer"), output)


def test_checkpointing_repeats_what_chance_did() -> None:
    kernel = scaled("e4m2", "stochastic")
    expected = found(kernel, operands())
    x, weight, g = operands()
    torch.manual_seed(3)
    output = checkpoint(kernel, x, weight, None, "layer", use_reentrant=False)
    results = [output, *torch.autograd.grad(output, [x, weight], g)]
    for one, other in zip(expected, results, strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------ every derivative


def penalty(kernel: SimulatedKernel, create_graph: bool = True) -> list[Tensor]:
    """Gradients, and where they are differentiable the derivatives of their lengths."""
    x, weight, _ = operands()
    torch.manual_seed(3)
    output = kernel(x, weight, None, "layer")
    first = torch.autograd.grad(output.float().square().sum(), [x, weight], None, True, True)
    if not create_graph:
        return [each.detach() for each in first]
    lengths = sum(each.float().square().sum() for each in first)
    return [*first, *torch.autograd.grad(lengths, [x, weight])]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_second_derivatives_are_those_of_before(
    rounding: Rounding, in_float32: Callable[[], None]
) -> None:
    ours = penalty(scaled("e4m5", rounding))
    in_float32()
    for one, other in zip(ours, penalty(scaled("e4m5", rounding)), strict=True):
        assert sqnr_db(one, other) > 45


def test_gradients_to_be_differentiated_again_are_the_same() -> None:
    kernel = scaled("e4m5")
    x, weight, g = operands()
    output = kernel(x, weight, None, "layer")
    plain = torch.autograd.grad(output, [x, weight], g, retain_graph=True)
    again = torch.autograd.grad(output, [x, weight], g, create_graph=True)
    for one, other in zip(plain, again, strict=True):
        assert other.requires_grad
        assert sqnr_db(one, other) > 55


def test_many_gradients_at_once_are_those_one_by_one() -> None:
    """Each has a scale of its own."""
    x, weight, _ = operands()
    output = scaled("e4m5")(x, weight, None, "layer")
    rows = torch.randn(3, *output.shape).mul(torch.tensor([1, 1e-3, 1e3]).view(3, 1, 1, 1))
    rows = rows.bfloat16()
    together = torch.autograd.grad(output, [x, weight], rows, True, is_grads_batched=True)
    for index, row in enumerate(rows):
        for one, other in zip(
            torch.autograd.grad(output, [x, weight], row, True), together, strict=True
        ):
            assert sqnr_db(one, other[index]) > 50


def detached() -> tuple[Tensor, Tensor]:
    x, weight, _ = operands()
    return x.detach(), weight.detach()


TRANSFORMS: dict[str, Callable[[Products], Any]] = {
    "grad": lambda f: grad(lambda x, w: f(x, w).float().square().sum(), (0, 1))(*detached()),
    "vmap": lambda f: vmap(f, (0, None))(*detached()),
    "jvp": lambda f: jvp(f, detached(), detached()),
    "per sample": lambda f: vmap(
        grad(lambda x, w: f(x, w).float().square().sum(), (0, 1)), (0, None)
    )(*detached()),
}


@pytest.mark.parametrize("what", TRANSFORMS)
def test_transforms_see_through_it_as_before(what: str, in_float32: Callable[[], None]) -> None:
    kernel = scaled("e4m5")
    ours = TRANSFORMS[what](lambda x, w: kernel(x, w, None, "layer"))
    in_float32()
    before = TRANSFORMS[what](lambda x, w: kernel(x, w, None, "layer"))
    for one, other in zip(tree_leaves(ours), tree_leaves(before), strict=True):
        assert torch.equal(one, other)


def test_a_backward_under_vmap_of_a_forward_without() -> None:
    x, weight, g = operands()
    output = scaled("e4m5")(x, weight, None, "layer")

    def one(row: Tensor) -> Tensor:
        return torch.autograd.grad(output, x, row, retain_graph=True)[0]

    together = vmap(one)(torch.stack([g, 100 * g]))
    for each, scale in zip(together, (1, 100), strict=True):
        assert sqnr_db(one(scale * g), each) > 50
