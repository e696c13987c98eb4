"""SimulatedKernel rounds its three operands, and does nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_fp import convert
from lightning_fp.format_names import Rounding
from lightning_fp.kernels import Kernel, NativeKernel, SimulatedKernel
from lightning_fp.layers.statistics_table import StatisticsTable
from lightning_fp.numerics import FloatFormat, float_format, round_to_format, shares
from tests.helper import assert_product, kept_bytes, saved_tensors, sqnr_db


def simulated(name: str, rounding: Rounding = "nearest") -> SimulatedKernel:
    format = float_format(name)
    return SimulatedKernel(input=format, weight=format, grad_output=format, rounding=rounding)


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(2, 24, 32, requires_grad=True)
    weight = torch.randn(16, 32, requires_grad=True)
    bias = torch.randn(16, requires_grad=True)
    return x, weight, bias, torch.randn(2, 24, 16)


def test_protocol() -> None:
    kernel = simulated("e8m3")
    assert isinstance(kernel, Kernel)
    assert kernel == simulated("e8m3") != simulated("e8m3", "truncate")
    assert hash(kernel) == hash(simulated("e8m3"))
    assert kernel.name == "simulated"
    assert not kernel.runs_on_fp8_hardware


def test_e8m7_is_bf16_rounding_of_the_operands() -> None:
    x, weight, bias, gradient = operands()
    output = simulated("e8m7")(x, weight, bias, "layer")
    output.backward(gradient)
    x16, w16, g16 = (t.detach().bfloat16().float() for t in (x, weight, gradient))
    assert torch.equal(output, F.linear(x16, w16) + bias)
    assert x.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    assert_product(x.grad, g16, w16)
    assert_product(weight.grad, g16.flatten(0, 1).t(), x16.flatten(0, 1))
    torch.testing.assert_close(bias.grad, gradient.sum((0, 1)))


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("name", ["e8m3", "e5m2", "e4m3fnuz"])
def test_operands_are_rounded_to_the_format(name: str, rounding: Rounding) -> None:
    x, weight, _, _ = operands()
    format: FloatFormat = float_format(name)
    output = simulated(name, rounding)(x, weight, None, "layer")
    expected = F.linear(
        round_to_format(x, format, rounding), round_to_format(weight, format, rounding)
    )
    assert torch.equal(output, expected)


def test_more_mantissa_is_more_accurate() -> None:
    x, weight, _, _ = operands()
    reference = F.linear(x.double(), weight.double())
    errors = [sqnr_db(reference, simulated(f"e8m{m}")(x, weight, None, "")) for m in range(1, 10)]
    assert errors == sorted(errors)
    assert errors[-1] > errors[0] + 40


def test_non_finite_values_are_never_hidden() -> None:
    x, weight, _, _ = operands()
    with torch.no_grad():
        x[0, 0, 0], x[1, 1, 1] = torch.inf, torch.nan
    output = simulated("e8m3")(x, weight, None, "layer")
    assert not output[0, 0].isfinite().any()
    assert output[1, 1].isnan().all()
    assert output[0, 1:].isfinite().all()


def test_autocast_and_empty_input() -> None:
    kernel = simulated("e8m3")
    x, weight, bias, _ = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = kernel(x, weight, bias, "layer")
    assert output.dtype is torch.bfloat16
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is torch.float32
    empty = torch.empty(0, 32, requires_grad=True)
    kernel(empty, weight, bias, "layer").sum().backward()
    assert empty.grad is not None


def test_compiled_equals_eager_under_autocast() -> None:
    kernel, results = simulated("e8m3"), []

    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return kernel(x, weight, None, "layer")

    for function in (forward, torch.compile(forward, backend="aot_eager", fullgraph=True)):
        x, weight, _, gradient = (t.detach().requires_grad_() for t in operands_of(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = function(x, weight)
        output.backward(gradient.detach().to(output.dtype))
        results.append((output, x.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def operands_of(seed: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    return operands()


# ------------------------------------------------------------------ by chance


def products(kernel: SimulatedKernel, seed: int, *, compiled: bool = False) -> list[torch.Tensor]:
    """Output and gradients, from one state of torch's generator."""

    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return kernel(x, weight, None, "layer")

    x, weight, _, gradient = (t.detach().requires_grad_() for t in operands_of(0))
    if compiled:
        torch._dynamo.reset()
        forward = torch.compile(forward, backend="aot_eager", fullgraph=True)
    torch.manual_seed(seed)
    output = forward(x, weight)
    output.backward(gradient.detach())
    return [output.detach(), x.grad, weight.grad]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_generator_says_how_chance_falls(compiled: bool) -> None:
    kernel = simulated("e8m3", "stochastic")
    first, again, other = (products(kernel, seed, compiled=compiled) for seed in (1, 1, 2))
    for one, same, another in zip(first, again, other, strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, another)


def test_forward_and_backward_see_the_same_weight() -> None:
    """It is rounded twice, by one seed; and neither twice by the same, where it is called twice."""
    kernel = simulated("e8m2", "stochastic")
    eye, weight = torch.eye(32, requires_grad=True), torch.randn(16, 32)
    output = kernel(eye, weight, None, "layer")  # 0 and 1 are e8m2 numbers: these are the weight's
    output.backward(torch.eye(32)[:, :16])
    assert torch.equal(eye.grad[:16], output.detach().t())
    assert not torch.equal(kernel(eye, weight, None, "layer"), output)


def test_checkpointing_repeats_what_chance_did() -> None:
    kernel, results = simulated("e8m2", "stochastic"), []
    for checkpointed in (False, True):
        x, weight, _, gradient = (t.detach().requires_grad_() for t in operands_of(0))
        torch.manual_seed(3)
        if checkpointed:
            output = checkpoint(kernel, x, weight, None, "layer", use_reentrant=False)
        else:
            output = kernel(x, weight, None, "layer")
        output.backward(gradient.detach())
        results.append((output, x.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_the_mean_gradient_is_the_exact_one() -> None:
    """Each operand without bias, and independent of the others: so are the products."""
    kernel = simulated("e8m2", "stochastic")
    exact = products(simulated("e8m23"), 0)
    drawn = [products(kernel, seed) for seed in range(400)]
    nearest = products(simulated("e8m2"), 0)
    for index, wanted in enumerate(exact):
        draws = torch.stack([each[index] for each in drawn]).double()
        z = (draws.mean(0) - wanted) / (draws.std(0) / len(draws) ** 0.5)
        assert abs(z.mean()) < 3 / z.numel() ** 0.5
        assert abs(z.std() - 1) < 0.1
        assert sqnr_db(wanted, draws.mean(0)) > sqnr_db(wanted, nearest[index]) + 10


# ------------------------------------------------------------------ scales


def test_with_a_scale_of_an_eight_bit_format_it_is_the_fp8_kernel() -> None:
    e4m3, e5m2 = float_format("e4m3"), float_format("e5m2")
    ours = SimulatedKernel(input=e4m3, weight=e4m3, grad_output=e5m2, scaled=True)
    results = []
    for kernel in (ours, NativeKernel()):
        x, weight, _, gradient = (t.detach().requires_grad_() for t in operands_of(0))
        output = kernel(x * 1e-3, weight, None, "layer")
        output.backward(gradient.detach())
        results.append((output, x.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        assert sqnr_db(one, other) > 110


def test_a_scale_saves_a_narrow_format() -> None:
    x, weight, _, _ = operands()
    reference = 1e-5 * F.linear(x, weight)
    bare = simulated("e4m5")
    scaled = dataclasses.replace(bare, scaled=True)
    assert sqnr_db(reference, scaled(1e-5 * x, weight, None, "")) > 30
    assert sqnr_db(reference, bare(1e-5 * x, weight, None, "")) < 1


# ------------------------------------------------------------------ what is kept, and in what


@pytest.mark.parametrize("format", ["e8m3", "e8m3-stochastic", "e4m5-scaled"])
def test_the_parameter_is_kept_and_no_cast_of_it(format: str) -> None:
    """As FSDP2 wants it: a cast would keep the unsharded weight alive until backward."""
    model = nn.Sequential(nn.Linear(64, 512, bias=False))
    convert(model, "high", {"*": format})
    with saved_tensors() as kept:
        model(torch.randn(8, 64, requires_grad=True))
    assert kept_bytes(kept, model.parameters()) < 8 * 64 * 4 + 100


def test_narrow_operands_are_multiplied_in_bf16_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for fast in (False, True):
        monkeypatch.setattr("lightning_fp.kernels.hardware.CPU_HAS_BF16", fast)
        x, weight, _, gradient = (t.detach().requires_grad_() for t in operands_of(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = simulated("e8m3")(x, weight, None, "layer")
        output.backward(gradient.detach().to(output.dtype))
        results.append((output, x.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        # A float32 sum in another order may round to the other of two bf16 neighbours.
        assert sqnr_db(one, other) > 60
        assert (one != other).float().mean() < 0.01
    assert simulated("e8m8").product_dtype(torch.ones(2, dtype=torch.bfloat16)) is torch.float32


@pytest.mark.parametrize("rounding", ["truncate", "stochastic"])
def test_statistics_tell_of_the_rounding_asked_for(rounding: Rounding) -> None:
    def sqnr(format: str) -> float:
        model = nn.Sequential(nn.Linear(256, 64, bias=False))
        table = convert(model, "high", {"*": format}).precision_map
        statistics = StatisticsTable(table.layers)
        statistics.collect(True)
        before = torch.get_rng_state()
        expected = model(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)))
        used = torch.get_rng_state()
        torch.set_rng_state(before)
        statistics.collect(False)
        again = model(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(expected, again)  # they draw nothing themselves
        assert torch.equal(used, torch.get_rng_state())
        sums = next(iter(model)).statistics.recorded[0]
        return shares(sums)["sqnr_db"].item()

    # Errors uniform over a whole step in place of a half one: 6 dB; by chance 3 dB.
    expected = {"truncate": 6.0, "stochastic": 3.0}[rounding]
    assert abs(sqnr("e8m3") - sqnr(f"e8m3-{rounding}") - expected) < 0.8
