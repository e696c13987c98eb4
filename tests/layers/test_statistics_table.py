"""Statistics gathered inside the layers: what a step's operands were, however the step is run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lightning_fp import PrecisionMap, convert
from lightning_fp.layers.observe import OUTPUT_FEATURES
from lightning_fp.layers.statistics_table import OPERANDS, StatisticsTable
from lightning_fp.numerics import COLUMN, float_format, operand_statistics, shares
from tests.helper import saved_tensors, sum_rtol

FORMATS = ("fp8-dynamic", "fp8-delayed", "fp8-rowwise", "fp8-block", "mxfp8", "e4m3")


def observed(
    model: nn.Module, format: str = "e4m3", stride: int = 1
) -> tuple[StatisticsTable, PrecisionMap]:
    """Everything converted and collecting."""
    precision_map = convert(model, format, {"*": format}).precision_map
    table = StatisticsTable(dict(precision_map.layers), stride=stride)
    table.collect(True)
    return table, precision_map


def linear(bias: bool = False) -> nn.Linear:
    layer = nn.Linear(32, 16, bias=bias)
    nn.init.normal_(layer.weight, std=0.1)
    return layer


def backward(output: Tensor, weight: Tensor) -> None:
    (output * weight).sum().backward()


def assert_equal(a: Tensor, b: Tensor) -> None:
    """Counts are equal, sums as far as their order lets them: 1,024 values, products of 32 each."""
    torch.testing.assert_close(a, b, rtol=sum_rtol(1024, 32), atol=1e-9)


@pytest.mark.parametrize("format", FORMATS)
def test_operands_of_one_step(format: str) -> None:
    layer = linear()
    table, precision_map = observed(layer, format)
    x = torch.randn(24, 32, requires_grad=True) * 300
    g = torch.randn(24, 16) * 3e-3
    backward(layer(x), g)
    rows = table.take()[0]

    kernel = precision_map.layers[""].kernel
    for operand, tensor in {0: x, 1: layer.weight, 2: g}.items():
        scale, number_format = kernel.cast_of(operand, tensor.detach(), torch.zeros(3))
        work = (3 * 2 * 24 * 32 * 16, 0) if operand == 0 else (0, 0)
        expected = operand_statistics(tensor, scale, number_format, work=work)
        assert_equal(rows[OPERANDS.index(("input", "weight", "grad_output")[operand])], expected)
    output = rows[OPERANDS.index("output")]
    error = (layer(x) - x @ layer.weight.t()).square().sum().item()
    if format != "e4m3":  # there the output is rounded as well
        assert output[COLUMN["noise"]].item() == pytest.approx(error, rel=1e-3)
    assert output[COLUMN["numel"]] == 24 * 16


def test_simulated_values_are_clamped() -> None:
    layer = linear()
    table, _ = observed(layer)
    x = torch.ones(4, 32)
    x[0, :8] = 1000.0
    layer(x)
    row = dict(zip(COLUMN, table.take()[0, 0].tolist(), strict=True))
    assert (row["amax"], row["clamped"], row["excess"]) == (1000, 8, 8 * 552)


@pytest.mark.parametrize("format", ["fp8-delayed", "e4m3"])
def test_four_micro_batches_are_one_batch_of_four(format: str) -> None:
    x, g = torch.randn(32, 32) * 300, torch.randn(32, 16) * 1e-3
    layer = linear()
    table, precision_map = observed(layer, format)
    for _ in range(3):  # delayed scales: from now on they do not depend on the batch
        backward(layer(x), g)
        precision_map.step()
    table.take()

    backward(layer(x), g)
    whole = table.take()
    for part_x, part_g in zip(x.chunk(4), g.chunk(4), strict=True):
        backward(layer(part_x), part_g)
        table.fold()
    parts = table.take()
    parts[:, OPERANDS.index("weight"), 1:] /= 4  # the weight is cast by every micro-batch
    assert_equal(parts, whole)


@pytest.mark.parametrize("features", [64, 100])
def test_the_output_is_seen_through_some_features(features: int) -> None:
    """Which do not depend on the batch, and rotate: a bad one is found, and counted once."""
    layer = nn.Linear(32, features, bias=False)
    nn.init.normal_(layer.weight, std=0.1)
    with torch.no_grad():
        layer.weight[7] = 1000.0  # clamped
    table, _ = observed(layer)
    x = torch.randn(8, 32)
    stride = -(-features // OUTPUT_FEATURES)
    found = []
    for turn in range(stride):
        table.collect(True, turn)
        layer(x)
        whole = table.take()[0, OPERANDS.index("output")]
        assert whole[COLUMN["numel"]] == 8 * -(-features // stride)
        for part in x.chunk(4):
            layer(part)
        assert_equal(table.take()[0, OPERANDS.index("output")], whole)
        found.append(whole[COLUMN["clamp_noise"]].item() > 0)
    assert found.count(True) == 1


def test_a_layer_called_twice_before_one_backward() -> None:
    layer = linear()
    table, _ = observed(layer)
    x, y = torch.randn(8, 32) * 300, torch.randn(8, 32) * 500
    g, h = torch.randn(8, 16) * 1e-2, torch.randn(8, 16)
    backward(torch.cat([layer(x), layer(y)]), torch.cat([g, h]))
    rows = table.take()[0]
    for operand, tensor in (("input", torch.cat([x, y])), ("grad_output", torch.cat([g, h]))):
        work = (3 * 2 * 16 * 32 * 16, 0) if operand == "input" else (0, 0)
        expected = operand_statistics(tensor, torch.tensor(1.0), float_format("e4m3"), work=work)
        assert_equal(rows[OPERANDS.index(operand)], expected)


def test_more_calls_than_slots() -> None:
    """Then gradients of several calls add up in one slot, and amax is the largest within 3%."""
    layer = linear()
    table, _ = observed(layer)
    g = torch.randn(20, 4, 16)
    backward(torch.cat([layer(torch.randn(4, 32)) for _ in range(20)]), g.flatten(0, 1))
    row = table.take()[0, OPERANDS.index("grad_output")]
    assert row[COLUMN["numel"]] == g.numel()
    assert 1 <= (row[0] / g.abs().amax()).item() < 1.03


@pytest.mark.parametrize("format", ["fp8-dynamic", "fp8-delayed", "fp8-rowwise", "mxfp8"])
def test_gradients_of_some_inputs_alone_are_seen(format: str) -> None:
    layer = linear()
    table, _ = observed(layer, format)
    x, g = torch.randn(8, 32, requires_grad=True), torch.randn(8, 16)
    torch.autograd.grad((layer(x) * g).sum(), x)
    row = table.take()[0, OPERANDS.index("grad_output")]
    assert row[COLUMN["numel"]] == g.numel()
    torch.testing.assert_close(row[0].float(), g.abs().amax())


def test_the_larger_amax_counts_over_backwards() -> None:
    layer = linear()
    table, _ = observed(layer)
    for size in (3.0, 7.0, 5.0):
        backward(layer(torch.randn(4, 32)), torch.full((4, 16), size))
        table.fold()
    assert table.take()[0, OPERANDS.index("grad_output"), 0] == 7


class TestFrozen:
    def test_with_an_input_gradient(self) -> None:
        layer = linear().requires_grad_(False)
        table, _ = observed(layer)
        x = torch.randn(8, 32, requires_grad=True)
        backward(layer(x), torch.ones(8, 16))
        assert (table.take()[0, :, COLUMN["numel"]] > 0).all()

    def test_without_one(self) -> None:
        layer = linear().requires_grad_(False)
        table, _ = observed(layer)
        with saved_tensors() as kept:
            output = layer(torch.randn(8, 32))
        assert not output.requires_grad
        assert not kept
        numel = table.take()[0, :, COLUMN["numel"]]
        assert numel[OPERANDS.index("input")] > 0
        assert numel[OPERANDS.index("grad_output")] == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_share(reentrant: bool) -> None:
    """Forward runs twice: sums double, what is formed from them does not."""
    x, g = (torch.randn(8, 32) * 300).requires_grad_(), torch.randn(8, 16)
    layer = linear()
    table, _ = observed(layer)
    backward(layer(x), g)
    plain = table.take()
    backward(checkpoint(layer, x, use_reentrant=reentrant), g)
    again = table.take()
    for name, share in shares(plain).items():
        torch.testing.assert_close(shares(again)[name], share, equal_nan=True, msg=name)
    assert_equal(again[..., 0], plain[..., 0])
    assert_equal(again[:, OPERANDS.index("grad_output")], plain[:, OPERANDS.index("grad_output")])


class TestCompiled:
    @pytest.mark.parametrize("format", ["fp8-delayed", "e4m3"])
    def test_as_eager_with_two_graphs(self, format: str) -> None:
        torch.manual_seed(0)
        eager = nn.Sequential(linear(), nn.ReLU())
        compiled = nn.Sequential(linear(), nn.ReLU())
        compiled.load_state_dict(eager.state_dict())
        x, g = torch.randn(8, 32) * 300, torch.randn(8, 16)
        tables = [observed(model, format) for model in (eager, compiled)]
        counter = CompileCounterWithBackend("aot_eager")
        compiled.compile(backend=counter, fullgraph=True)
        taken: list[list[Tensor]] = [[], []]
        for step in range(6):
            for (table, precision_map), model, into in zip(
                tables, (eager, compiled), taken, strict=True
            ):
                table.collect(step % 2 == 0 or step < 2)
                backward(model(x), g)
                precision_map.step()
                into.append(table.take())
            if step == 3:
                graphs = counter.frame_count
        assert counter.frame_count == graphs  # in steady state: one with statistics, one without
        assert graphs == 2 + (format == "fp8-delayed")  # and one while scales are looked for
        for one, other in zip(*taken, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class TestWhatIsCollected:
    def test_layers_in_high_precision_are_left_out(self) -> None:
        model = nn.Sequential(linear(), nn.Linear(16, 16))
        report = convert(model, "e4m3", {"0": "e4m3", "1": "bf16"})
        table = StatisticsTable(dict(report.precision_map.layers))
        table.collect(True)
        model(torch.randn(4, 32))
        numel = table.take()[..., COLUMN["numel"]]
        assert (numel[0, :2] > 0).all()
        assert (numel[1] == 0).all()
        assert [format.name for format in table.formats()] == ["e4m3", "bf16"]

    @pytest.mark.parametrize(
        "quiet", [lambda table, layer: table.collect(False), lambda table, layer: layer.eval()]
    )
    def test_only_where_asked(self, quiet: Callable[[StatisticsTable, nn.Module], None]) -> None:
        layer = linear()
        table, _ = observed(layer)
        quiet(table, layer)
        layer(torch.randn(4, 32))
        assert (table.take() == 0).all()

    def test_taken_once(self) -> None:
        layer = linear()
        table, _ = observed(layer)
        backward(layer(torch.randn(4, 32)), torch.ones(4, 16))
        assert (table.take()[..., COLUMN["numel"]] > 0).all()
        assert (table.take() == 0).all()

    def test_empty_input(self) -> None:
        layer = linear()
        table, _ = observed(layer)
        backward(layer(torch.randn(0, 32)), torch.ones(0, 16))
        assert (table.take() == 0).all()

    def test_closed(self) -> None:
        layer = linear()
        table, precision_map = observed(layer)
        table.close()
        layer(torch.randn(4, 32))
        assert precision_map.layers[""].statistics is None
        assert table.take().shape[0] == 0


def test_a_sampled_row_has_its_turn() -> None:
    """An outlier row: all elements are counted at once, its error within `stride` steps."""
    layer = linear()
    table, _ = observed(layer, stride=4)
    x = torch.ones(8, 32)
    x[3] = 1000.0
    signal = []
    for turn in range(4):
        table.collect(True, turn)
        layer(x)
        row = dict(zip(COLUMN, table.take()[0, 0].tolist(), strict=True))
        assert row["clamped"] == 32
        signal.append(row["signal"])
    assert sorted(value > 1e6 for value in signal) == [False, False, False, True]


@pytest.mark.parametrize(
    "format",
    ["fp8-dynamic", *(pytest.param(f, marks=pytest.mark.slow) for f in ("fp8-block", "mxfp8"))],
)
def test_a_sampled_step_compiled_with_dynamic_shapes(format: str) -> None:
    """Floats are symbolic there: one that is NaN, or a module's, ended the run."""
    layer = linear()
    table, _ = observed(layer, format)
    run = torch.compile(layer, backend="aot_eager", dynamic=True)
    for tokens in (7, 24):
        backward(run(torch.randn(tokens, 32)), torch.ones(16))
        table.fold()
    assert table.take()[0, 0, COLUMN["numel"]] == 31 * 32
