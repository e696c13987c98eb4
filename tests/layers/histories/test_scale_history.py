"""Delayed scaling in layers: what the histories hold, however a step is run."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_fp import DelayedScaling, FP8Precision, PrecisionMap, convert
from lightning_fp.kernels.memory import OperandMemory
from lightning_fp.layers import FPLinear
from lightning_fp.layers.statistics_table import StatisticsTable
from lightning_fp.numerics import COLUMN, FORMATS
from tests.helper import fit, make_trainer, saved_tensors, sqnr_db

INPUT, WEIGHT, GRAD_OUTPUT = range(3)
E4M3 = FORMATS["e4m3"]


def layer(in_features: int = 32, out_features: int = 16) -> FPLinear:
    linear = nn.Linear(in_features, out_features, bias=False)
    nn.init.normal_(linear.weight, std=0.1)
    return linear  # pyright: ignore[reportReturnType]


def delayed(model: nn.Module) -> PrecisionMap:
    return convert(model, "fp8-delayed", {"*": "fp8-delayed"}).precision_map


def newest(table: PrecisionMap) -> Tensor:
    """float32 [layers, operands]: what came into the histories last."""
    return table.state_dict()["scales"]["history"][..., 0]


def histories(table: PrecisionMap) -> Tensor:
    return table.state_dict()["scales"]["history"]


def step(model: nn.Module, x: Tensor, g: Tensor, table: PrecisionMap) -> None:
    (model(x) * g).sum().backward()
    table.step()


class TestValues:
    def test_after_warm_up_against_float64(self) -> None:
        model = layer(128, 64)
        table = delayed(model)
        torch.manual_seed(0)
        for _ in range(4):
            step(model, torch.randn(192, 128), torch.randn(192, 64) * 1e-4, table)
        model.weight.grad = None
        x, g = torch.randn(192, 128, requires_grad=True), torch.randn(192, 64) * 1e-4
        output = model(x)
        output.backward(g)
        exact_x, weight, exact_g = x.detach().double(), model.weight.detach().double(), g.double()
        assert sqnr_db(exact_x @ weight.t(), output) >= 25
        assert sqnr_db(exact_g @ weight, x.grad) >= 22.5
        assert sqnr_db(exact_g.t() @ exact_x, model.weight.grad) >= 21.5

    def test_learns_as_dynamic_does(self) -> None:
        losses = [fit(FP8Precision(name), max_steps=60).losses for name in ("delayed", "dynamic")]
        delayed, dynamic = (sum(curve[-10:]) for curve in losses)
        assert losses[0] != losses[1]
        assert abs(delayed / dynamic - 1) < 0.01

    def test_a_spike_clamps_what_is_counted_and_is_known_a_step_later(self) -> None:
        model = layer()
        table = delayed(model)
        statistics = StatisticsTable(dict(table.layers), stride=1)
        x, g = torch.rand(64, 32) + 0.5, torch.randn(64, 16)  # amax below 1.5
        for _ in range(3):
            step(model, x, g, table)
        spike = x.clone()
        spike[5, :7] = 8 * x.amax()
        seen = []
        for values in (spike, spike):
            statistics.collect(True)
            scale = model.memory.scales[INPUT].clone()
            output = model(values)
            cast = (values * scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() / scale
            weight_scale = model.memory.scales[WEIGHT]
            weight = (model.weight * weight_scale).to(torch.float8_e4m3fn).double() / weight_scale
            torch.testing.assert_close(output.double(), cast @ weight.t(), rtol=1e-4, atol=1e-4)
            (output * g).sum().backward()
            table.step()
            row = statistics.take()[0, 0]
            seen.append(row[COLUMN["clamped"]].item())
            excess = ((values * scale).abs() - 448).clamp(min=0).sum().item()
            assert row[COLUMN["excess"]].item() == pytest.approx(excess, rel=1e-4)
        assert seen == [7, 0]

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    @pytest.mark.parametrize("operand", ["input", "weight", "grad_output"])
    def test_what_is_not_finite_is_counted_on_that_very_step(
        self, operand: str, value: float
    ) -> None:
        model = layer()
        table = delayed(model)
        x, g = torch.randn(8, 32), torch.randn(8, 16)
        for _ in range(3):
            step(model, x, g, table)
        table.scale_history.take_amax_record()
        before = histories(table)
        bad = {"input": x, "weight": model.weight.detach(), "grad_output": g}
        bad[operand].view(-1)[17] = value
        x.requires_grad_()
        model.weight.grad = None
        output = model(x)
        output.backward(g)
        products = {"output": output, "dx": x.grad, "dW": model.weight.grad}
        operands = {"output": "input weight", "dx": "grad_output weight", "dW": "grad_output input"}
        for name, product in products.items():
            assert product.isnan().all().item() is (operand in operands[name].split()), name
        table.step()
        index = ("input", "weight", "grad_output").index(operand)
        count = table.scale_history.take_amax_record().values[0, :, 2]
        assert count[index] == 1
        after = histories(table)
        assert torch.equal(after[0, index], before[0, index])  # the old scale stays
        assert torch.isfinite(after).all()

    def test_headroom_is_negative_by_the_bits_that_were_missing(self) -> None:
        model = layer()
        table = delayed(model)
        x, g = torch.randn(8, 32), torch.randn(8, 16)
        for _ in range(2):
            step(model, x, g, table)
        table.scale_history.take_amax_record()
        step(model, x, g, table)
        step(model, x * 8, g, table)
        step(model, x, g, table)
        amax, headroom = table.scale_history.take_amax_record().values[0, INPUT, :2]
        assert amax.item() == pytest.approx(8 * x.abs().amax().item())
        assert headroom.item() == pytest.approx(-3, abs=1e-4)


class TestStepsBetweenForwardAndBackward:
    """As in a GAN, whose generator's graph is older than the discriminator's step."""

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize("collect", [False, True], ids=["", "collecting"])
    def test_a_graph_keeps_the_scales_of_its_forward(self, collect: bool, compiled: bool) -> None:
        gradients = []
        for steps_between in (0, 2):
            torch.manual_seed(0)
            generator, discriminator = layer(16, 32), layer(32, 16)
            model = nn.Sequential(generator, discriminator)
            table = delayed(model)
            statistics = StatisticsTable(dict(table.layers), stride=2)
            if compiled:
                generator.compile(backend="aot_eager", fullgraph=True)
            noise, g = torch.randn(8, 16), torch.randn(8, 16)
            for _ in range(3):
                step(model, noise, g, table)
            model.zero_grad()
            statistics.collect(collect, turn=1)
            fake = generator(noise)
            for turn in range(steps_between):
                (discriminator(fake.detach() * 30) * g).sum().backward()
                table.step()
                statistics.collect(collect, turn)
            (fake * 1.25).sum().backward()
            gradients.append(generator.weight.grad)
        assert torch.equal(*gradients)

    def test_scales_stay_where_a_cuda_graph_reads_them(self) -> None:
        model = layer()
        table = delayed(model)
        x, g = torch.randn(8, 32), torch.randn(8, 16)
        for _ in range(2):
            step(model, x, g, table)
        before = model.memory.scales
        step(model, 2 * x, g, table)
        assert model.memory.scales is not before
        model.memory.captured = True  # as a capture does
        before = model.memory.scales
        step(model, 4 * x, g, table)
        assert model.memory.scales is before
        assert before[INPUT].item() == pytest.approx(448 / (4 * x).abs().amax().item())

    def test_a_graph_captured_where_a_layer_has_moved_reads_new_scales(self) -> None:
        """A layer that has moved, or is on another device, has a copy of its scales and no view."""
        model = layer()
        table = delayed(model)
        x, g = torch.randn(8, 32), torch.randn(8, 16)
        for _ in range(2):
            step(model, x, g, table)
        model.memory.scales = before = model.memory.scales.clone()
        model.memory.captured = True
        step(model, 4 * x, g, table)
        assert model.memory.scales is before
        assert before[INPUT].item() == pytest.approx(448 / (4 * x).abs().amax().item())

    def test_two_optimizers_one_forward_of_the_generator(self) -> None:
        class Adversaries(L.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False
                torch.manual_seed(0)
                self.generator, self.discriminator = nn.Linear(16, 32), nn.Linear(32, 16)

            def training_step(self, batch: Tensor, index: int) -> None:
                of_generator, of_discriminator = self.optimizers()
                fake = self.generator(batch)
                for optimizer, given in ((of_discriminator, fake.detach()), (of_generator, fake)):
                    optimizer.zero_grad()
                    self.manual_backward(self.discriminator(given).square().mean())
                    optimizer.step()

            def configure_optimizers(self) -> list[torch.optim.Optimizer]:
                halves = self.generator, self.discriminator
                return [torch.optim.AdamW(half.parameters(), lr=1e-3) for half in halves]

        plugin = FP8Precision("delayed", layers={"*": "fp8-delayed"})
        trainer = make_trainer(plugin, max_epochs=1)
        # One step of the discriminator writes its weight, which the generator's loss uses after.
        trainer.fit(Adversaries(), DataLoader(torch.randn(12, 8, 16), batch_size=None))
        assert trainer.global_step == 24


class TestHistories:
    def test_micro_batches_are_one_step(self) -> None:
        x, g = torch.randn(32, 32), torch.randn(32, 16)
        found = []
        for parts in (1, 4):
            torch.manual_seed(0)
            model = layer()
            table = delayed(model)
            for part_x, part_g in zip(x.chunk(parts), g.chunk(parts), strict=True):
                (model(part_x) * part_g).sum().backward()
                table.after_backward()
            table.step()
            found.append(histories(table))
        assert torch.equal(*found)
        assert (found[0][..., 0] > 0).all()
        assert (found[0][..., 1:] == 0).all()

    def test_a_layer_called_twice_before_one_backward(self) -> None:
        model = layer()
        table = delayed(model)
        x, y, g = torch.randn(8, 32), torch.randn(8, 32) * 3, torch.randn(16, 16)
        (torch.cat([model(x), model(y)]) * g).sum().backward()
        table.step()
        expected = [y.abs().amax(), model.weight.abs().amax(), g.abs().amax()]
        torch.testing.assert_close(newest(table)[0], torch.stack(expected).detach())

    @pytest.mark.parametrize("frozen", ["kept", "stored"])
    @pytest.mark.parametrize("how", ["grad", "grad of a graph", "backward to inputs"])
    def test_gradients_of_some_inputs_alone_are_recorded(self, how: str, frozen: Any) -> None:
        found = []
        for way in ("backward", how):
            torch.manual_seed(0)
            model = nn.Sequential(layer(32, 32), layer())
            model.requires_grad_(frozen == "kept")
            report = convert(model, "fp8-delayed", {"*": "fp8-delayed"}, frozen=frozen)
            x, g = torch.randn(8, 32, requires_grad=True), torch.randn(8, 16)
            for scale in (1.0, 100.0):
                loss = (model(x) * g).sum() * scale
                if way == "backward":
                    loss.backward()
                elif way == "backward to inputs":
                    loss.backward(inputs=[x])
                else:
                    torch.autograd.grad(loss, x, create_graph=way == "grad of a graph")
                report.precision_map.step()
            found.append(histories(report.precision_map))
        assert torch.equal(*found)
        assert (found[0][..., :2] > 0).all()

    def test_a_layer_that_did_not_run_keeps_its_history(self) -> None:
        model = nn.ModuleList([layer(), layer()])
        table = delayed(model)
        x, g = torch.randn(8, 32), torch.randn(8, 16)
        for run in (0, 1, 1):
            (model[run](x) * g).sum().backward()
            table.step()
        filled = (histories(table) > 0).sum(dim=-1)
        assert filled.tolist() == [[1, 1, 1], [2, 2, 2]]

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_changes_nothing(self, reentrant: bool) -> None:
        x, g = torch.randn(8, 32, requires_grad=True), torch.randn(8, 16)
        found = []
        for checkpointed in (False, True):
            torch.manual_seed(0)
            model = layer()
            table = delayed(model)
            for _ in range(3):
                run = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
                (run * g).sum().backward()
                table.step()
            found.append(torch.cat([histories(table).flatten(), model.weight.grad.flatten()]))
        assert torch.equal(*found)

    @pytest.mark.parametrize("input_gradient", [True, False])
    def test_frozen(self, input_gradient: bool) -> None:
        model = layer().requires_grad_(False)
        table = delayed(model)
        x = torch.randn(8, 32, requires_grad=input_gradient)
        with saved_tensors() as kept:
            output = model(x)
        if input_gradient:
            output.sum().backward()
        else:
            assert not kept  # no activations for the sake of statistics
        table.step()
        assert (newest(table)[0] > 0).tolist() == [True, True, input_gradient]

    def test_regional_compile(self) -> None:
        found = []
        for compiled in (False, True):
            torch.manual_seed(0)
            blocks = nn.Sequential(*(nn.Sequential(layer(32, 32), nn.Tanh()) for _ in range(2)))
            table = delayed(blocks)
            if compiled:
                for block in blocks:
                    block.compile(backend="aot_eager", fullgraph=True)
            generator = torch.Generator().manual_seed(1)
            for _ in range(4):
                x, g = (torch.randn(8, 32, generator=generator) for _ in range(2))
                (blocks(x) * g).sum().backward()
                table.after_backward()
                (blocks(x * 2) * g).sum().backward()
                table.step()
            found.append(histories(table))
        torch.testing.assert_close(*found, rtol=1e-3, atol=0)

    def test_evaluation_stays_out(self) -> None:
        model = layer()
        report = convert(model, "fp8-delayed", {"*": "fp8-delayed"}, fp8_eval=True)
        table = report.precision_map
        step(model, torch.randn(8, 32), torch.randn(8, 16), table)
        before = histories(table)
        model.eval()
        model(torch.randn(8, 32) * 100)
        model.train()
        step(model, torch.randn(8, 32), torch.randn(8, 16), table)
        after = histories(table)
        assert torch.equal(after[..., 1], before[..., 0])
        assert after[0, INPUT, 0] < 10

    def test_each_entry_is_a_cold_start(self) -> None:
        model = layer()
        table = delayed(model)
        x, g = torch.randn(8, 32), torch.randn(8, 16)
        for _ in range(3):
            step(model, x * 100, g, table)
        table.set("*", "fp8-dynamic")
        table.apply()
        assert model.memory is None
        table.set("*", "fp8-delayed")
        table.apply()
        assert (histories(table) == 0).all()
        dynamic = layer()
        convert(dynamic, "fp8-dynamic", {"*": "fp8-dynamic"})
        with torch.no_grad():
            dynamic.weight.copy_(model.weight)
        assert torch.equal(model(x), dynamic(x))

    def test_state_round_trip(self) -> None:
        def run(model: FPLinear, table: PrecisionMap, steps: range) -> Tensor:
            for at in steps:
                generator = torch.Generator().manual_seed(at)
                step(model, torch.randn(8, 32, generator=generator), torch.ones(8, 16), table)
            return torch.cat([histories(table).flatten(), model.weight.grad.flatten()])

        model = layer()
        table = delayed(model)
        run(model, table, range(5))
        other = layer()
        other.load_state_dict(model.state_dict())
        other_table = delayed(other)
        other_table.load_state_dict(table.state_dict())
        model.weight.grad = None
        whole, resumed = run(model, table, range(5, 9)), run(other, other_table, range(5, 9))
        assert torch.equal(whole, resumed)

    def test_another_length_starts_anew_and_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        model, other = layer(), layer()
        table = delayed(model)
        step(model, torch.randn(8, 32), torch.randn(8, 16), table)
        plugin = FP8Precision(DelayedScaling(history_len=4), layers={"*": "fp8-delayed"})
        plugin.precision_map.load_state_dict(table.state_dict())
        plugin.convert_module(other)
        assert "history_len changed from 16 to 4" in caplog.text
        assert (histories(plugin.precision_map) == 0).all()


def test_the_memory_is_where_a_forward_computes() -> None:
    """Whichever way the weights got there: `.data` tells nobody. A copy stands in for a device."""

    class Elsewhere(OperandMemory):
        """On a device of its own until it is asked for."""

        def on(self, device: torch.device) -> OperandMemory:
            return OperandMemory(self.scales.clone())

    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    table = convert(model, "fp8-delayed", layers={"*": "fp8-delayed"}).precision_map
    x = torch.randn(4, 16)
    model(x).sum().backward()
    table.step()
    before = [layer.memory.scales.clone() for layer in model]
    model[1].memory = Elsewhere(model[1].memory.scales)
    model(x).sum().backward()
    assert type(model[1].memory) is OperandMemory
    assert torch.equal(model[1].memory.scales, before[1])
    table.step()
    history = table.state_dict()["scales"]["history"]
    assert (history[..., :2] > 0).all()
    in_force = table.scale_history.in_force()
    assert in_force is not None
    for layer, row in zip(model, in_force.values, strict=True):
        assert torch.equal(layer.memory.scales, row)
