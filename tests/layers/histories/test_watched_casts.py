"""Layers whose casts are merely watched: their amax is known, and nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_fp import PrecisionMap, convert
from lightning_fp.kernels.memory import OperandMemory


def two_layers(format: str) -> tuple[nn.Sequential, PrecisionMap]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16))
    return model, convert(model, format, {"*": format}).precision_map


def step(model: nn.Module, x: Tensor, table: PrecisionMap) -> Tensor:
    output = model(x)
    output.square().mean().backward()
    table.step()
    return output.detach()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_largest_values_over_the_micro_batches_of_a_step(compiled: bool) -> None:
    model, table = two_layers("fp8-dynamic")
    table.watch_casts(True)
    run = torch.compile(model) if compiled else model
    first, second = torch.randn(4, 32), 3 * torch.randn(4, 32)
    run(first).sum().backward()
    step(run, second, table)
    amax = table.scale_history.amax
    assert table.scale_history.names == ["0", "2"]
    assert amax[0, 0] == second.abs().max()
    assert amax[0, 1] == model[0].weight.abs().max()
    step(run, first, table)
    assert table.scale_history.amax[0, 0] == first.abs().max()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_shows(value: float) -> None:
    model, table = two_layers("fp8-dynamic")
    table.watch_casts(True)
    x = torch.randn(4, 32)
    x[1, 2] = value
    step(model, x, table)
    assert table.scale_history.amax[0, 0] == math.inf


def test_nothing_else_is_recorded_or_kept() -> None:
    model, table = two_layers("fp8-dynamic")
    table.watch_casts(True)
    x = torch.randn(4, 32)
    watched = [step(model, x, table) for _ in range(3)]
    other, untouched = two_layers("fp8-dynamic")
    assert all(map(torch.equal, watched, [step(other, x, untouched) for _ in range(3)]))
    assert all(each.grad_leaf.grad is None for each in memories(model))
    assert table.scale_history.take_amax_record().layers == []
    assert bool(torch.isinf(table.scale_history.headroom).all())
    saved = table.state_dict()["scales"]
    assert (saved["layers"], len(saved["history"])) == ([], 0)


def test_a_layer_that_comes_to_delayed_scaling_begins_as_if_nobody_had_watched() -> None:
    torch.manual_seed(1)
    first, second = torch.randn(4, 32), torch.randn(4, 32)

    def outputs(watch: bool) -> list[Tensor]:
        model, table = two_layers("fp8-dynamic")
        table.watch_casts(watch)
        before = step(model, 100 * first, table)
        table.set("*", "fp8-delayed", reason="a test")
        table.apply()
        return [before, *(step(model, second, table) for _ in range(3))]

    assert all(map(torch.equal, outputs(True), outputs(False)))


def test_layers_under_delayed_scaling_are_recorded_in_full_all_the_same() -> None:
    model, table = two_layers("fp8-dynamic")
    table.set("0", "fp8-delayed", reason="a test")
    table.apply()
    table.watch_casts(True)
    table.scale_history.take_amax_record()  # what was before
    x = torch.randn(4, 32)
    for _ in range(2):
        step(model, x, table)
    record = table.scale_history.take_amax_record()
    assert record.layers == ["0"]
    assert bool((record.values[0, :, 0] > 0).all())
    assert table.scale_history.amax[1, 0] > 0


def test_who_follows_as_well_sees_all_and_goes_on_when_the_watch_ends() -> None:
    model, table = two_layers("fp8-dynamic")
    table.watch_casts(True)
    table.follow(True)
    step(model, torch.randn(4, 32), table)
    table.watch_casts(False)
    step(model, torch.randn(4, 32), table)
    record = table.scale_history.take_amax_record()
    assert set(record.layers) == {"0", "2"}
    assert len(table.scale_history) == 2
    table.follow(False)
    assert not len(table.scale_history)


def memories(model: nn.Module) -> list[OperandMemory]:
    found = [getattr(module, "memory", None) for module in model.modules()]
    return [memory for memory in found if isinstance(memory, OperandMemory)]
