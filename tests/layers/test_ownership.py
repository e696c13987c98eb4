"""A layer belongs to one table: conversions after conversions, copies, weights that come later."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fp import FP8Precision, PrecisionMap, convert, revert
from lightning_fp.layers import FPLinear
from lightning_fp.layers.statistics_table import StatisticsTable
from tests.helper import LanguageModel, fit


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


def train(model: nn.Module, table: PrecisionMap, times: float = 1.0, steps: int = 6) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        model(torch.randn(16, 32, generator=generator) * times).sum().backward()
        table.step()


def error(model: nn.Module, times: float = 1.0) -> float:
    """Of the first layer's output: about 0.04 in FP8, 0 in high precision, 1 with a stale scale."""
    layer, x = model[0], torch.randn(16, 32, generator=torch.Generator().manual_seed(2)) * times
    want = F.linear(x, layer.weight, layer.bias)
    return ((layer(x) - want).norm() / want.norm()).item()


@pytest.mark.parametrize("second", ["fp8-delayed", "fp8-dynamic", "bf16", "fp8-rowwise", "auto"])
@pytest.mark.parametrize("first", ["fp8-delayed", "fp8-dynamic", "auto"])
def test_the_last_conversion_has_the_layers_and_the_first_has_none(first: str, second: str) -> None:
    model = network()
    earlier = convert(model, first).precision_map
    train(model, earlier)
    table = convert(model, second).precision_map
    assert len(table.layers) == 2 > len(earlier.layers) == len(earlier.scale_history) == 0
    keeps = second in ("fp8-delayed", "auto")
    assert len(table.scale_history) == 2 * keeps
    for layer in table.layers.values():
        assert layer.record == keeps == (layer.memory is not None)
    for _ in range(2):
        train(model, table, times=100)
        earlier.step()
    assert error(model, times=100) < 0.06
    assert earlier.formats() == {}
    with pytest.raises(ValueError, match=r"no layers any more.*new table"):
        earlier.set("*", "bf16")
    fresh = network()
    train(fresh, convert(fresh, second).precision_map, times=100)
    train(fresh, convert(fresh, second).precision_map, times=100)
    assert error(fresh, times=100) == error(model, times=100)


def test_a_table_that_has_lost_some_layers_keeps_the_others() -> None:
    model = network()
    table = convert(model, "fp8-delayed").precision_map
    train(model, table)
    history = table.state_dict()["scales"]["history"][1]
    last = nn.Sequential(model[0])
    other = convert(last, "fp8-delayed").precision_map
    assert list(table.layers) == ["2"]
    assert list(other.layers) == ["0"]
    assert torch.equal(table.state_dict()["scales"]["history"][0], history)
    for _ in range(3):
        train(model, table, times=100, steps=1)
        other.step()
    assert error(model, times=100) < 0.06


def test_after_revert_a_step_does_nothing() -> None:
    model = network()
    table = convert(model, "fp8-delayed").precision_map
    statistics = StatisticsTable(dict(table.layers))
    statistics.collect(True)
    train(model, table)
    revert(model)
    x = torch.randn(4, 32)
    output = model(x)
    output.sum().backward()
    table.after_backward()
    assert table.step() == []
    assert table.formats() == {}
    table.clear()
    assert table.step() == []


def test_two_trainers_one_model() -> None:
    model = LanguageModel()
    fit(FP8Precision("delayed"), model, max_steps=4)
    plugin = FP8Precision("delayed")
    fit(plugin, model, max_steps=4)
    scales = plugin.precision_map.state_dict()["scales"]
    assert len(scales["layers"]) == 8
    assert bool((scales["history"][..., 0] > 0).all())


@pytest.mark.parametrize("scaling", ["delayed", "auto", "dynamic"])
@pytest.mark.parametrize("before", ["fp8-delayed", "fp8-dynamic"])
def test_convert_in_configure_model_and_the_plugin_after(before: str, scaling: str) -> None:
    class Converts(LanguageModel):
        def configure_model(self) -> None:
            if not isinstance(self.model.blocks[0].fc1, FPLinear):
                convert(self, before)

    plugin = FP8Precision(scaling, **({"tokens": 1e9} if scaling == "auto" else {}))
    model = fit(plugin, Converts(), max_steps=6)
    table = plugin.precision_map
    keeps = scaling != "dynamic"
    assert len(table.scale_history) == len(table.state_dict()["scales"]["layers"]) == 8 * keeps
    assert all(layer.record == keeps for layer in model.modules() if is_fp8(layer))
    if scaling == "delayed":
        assert not any(layer.kernel.cold for layer in table.layers.values() if is_fp8(layer))


def is_fp8(layer: object) -> bool:
    return isinstance(layer, FPLinear) and not layer.format.is_high_precision


def test_one_plugin_for_two_models_in_turn() -> None:
    plugin, models = FP8Precision("delayed"), [LanguageModel(), LanguageModel()]
    for model in (*models, *models):
        fit(plugin, model, max_steps=3)
        tracked = plugin.precision_map.state_dict()["scales"]
        assert len(tracked["layers"]) == 8
        assert bool((tracked["history"][..., 0] > 0).all())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_scales_by_itself(how: str) -> None:
    model = network()
    table = convert(model, "fp8-delayed").precision_map
    statistics = StatisticsTable(dict(table.layers))
    train(model, table)
    statistics.collect(True)
    table.phase.evaluating = False  # in the middle of a step
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    table.phase.evaluating = None
    train(twin, table, times=100)
    assert error(twin, times=100) < 0.06
    assert error(model) < 0.06
    twin.eval()
    assert error(twin) == 0
    assert convert(twin, "fp8-delayed").precision_map.formats() == table.formats()
    assert len(table.layers) == 2


def test_a_table_copied_with_its_model_goes_on() -> None:
    model = network()
    table = convert(model, "fp8-delayed").precision_map
    train(model, table)
    twin, copied = copy.deepcopy((model, table))
    train(twin, copied, times=100)
    assert twin[0] is copied.layers["0"]
    assert error(twin, times=100) < 0.06
    assert error(model) < 0.06


@pytest.mark.parametrize("how", ["to_empty", "assign", "parameters"])
@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_weights_may_come_after_the_conversion(how: str, resumed: bool) -> None:
    source = network()
    expected = convert(network_like(source), "fp8-delayed").precision_map
    with torch.device("meta"):
        model = network()
    table = convert(model, "fp8-delayed").precision_map
    if resumed:
        other = convert(source, "fp8-delayed").precision_map
        train(source, other)
        for each in (table, expected):
            each.load_state_dict(other.state_dict())
    state = network_like(source).state_dict()
    if how == "to_empty":
        model.to_empty(device="cpu").load_state_dict(state)
    elif how == "assign":
        model.load_state_dict(state, assign=True)
    else:
        for name in ("weight", "bias"):
            for index in (0, 2):
                setattr(model[index], name, nn.Parameter(state[f"{index}.{name}"].clone()))
    assert not any(tensor.is_meta for tensor in model.parameters())
    reference = expected.model
    train(reference, expected)
    train(model, table)
    assert torch.equal(history(table), history(expected))
    assert error(model) == error(reference) < 0.06


def history(table: PrecisionMap) -> Tensor:
    return table.state_dict()["scales"]["history"]


def network_like(model: nn.Module) -> nn.Sequential:
    """The same values, never converted."""
    twin = network()
    twin.load_state_dict(model.state_dict())
    return twin
