"""Models that come from elsewhere, or go there: converted before, wrapped, transformed, copied."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.data import DataLoader

from lightning_fp import FP8Precision, FP16Precision, convert, revert
from lightning_fp.layers import FPLinear, PrecisionMap
from tests.cases.programs import Program, error, fit, made, rows


def output_error(module: Any, x: Tensor) -> float:
    """Of the first layer, in the formats of a training step."""
    layer = module.body[0].train()
    with torch.no_grad():
        return error(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.compatibility("wrappers", "the same model in a second Trainer", "works")
@pytest.mark.parametrize(("first", "second"), [("delayed", "delayed"), ("dynamic", "delayed")])
def test_a_second_trainer_takes_the_layers_over(tmp_path: Path, first: Any, second: Any) -> None:
    module, plugin = made(Program, rate=0.0), FP8Precision(second)
    fit(module, FP8Precision(first), tmp_path)
    larger = DataLoader(rows(32) * 50, batch_size=8)
    fit(module, plugin, tmp_path, data=larger, max_epochs=4)
    assert len(plugin.precision_map.scale_history) == 2
    assert output_error(module, rows(8) * 50) < 0.08


class Before(Program):
    format: Any = "fp8-delayed"

    def configure_model(self) -> None:
        if type(self.body[0]) is nn.Linear:
            convert(self, self.format, layers={"head": "high"})


@pytest.mark.compatibility("wrappers", "`convert` in `configure_model`, then the plugin", "works")
@pytest.mark.parametrize("before", ["fp8-delayed", "fp8-dynamic", "high"])
@pytest.mark.parametrize("scaling", ["auto", "delayed"])
def test_the_plugin_takes_over_what_was_converted_before(
    tmp_path: Path, before: str, scaling: Any
) -> None:
    module = made(Before, format=before)
    plugin = FP8Precision(scaling, tokens=1e9) if scaling == "auto" else FP8Precision(scaling)
    fit(module, plugin, tmp_path, max_epochs=3)
    assert len(plugin.precision_map.scale_history) == 2
    assert plugin.precision_map.state_dict()["scales"]["layers"] == ["body.0", "body.2"]


@pytest.mark.compatibility("wrappers", "`copy.deepcopy` of a warm model", "works")
@pytest.mark.parametrize("scaling", ["delayed", "dynamic"])
def test_a_copy_of_a_warm_model_scales_by_its_own_inputs(tmp_path: Path, scaling: str) -> None:
    module = made(Program)
    fit(module, FP8Precision(scaling), tmp_path, max_epochs=2)
    assert output_error(copy.deepcopy(module), rows(8) * 100) < 0.08


@pytest.mark.compatibility("wrappers", "a loop of one's own, after a Trainer", "works")
def test_a_loop_of_ones_own_after_a_trainer_scales_by_its_own_inputs(tmp_path: Path) -> None:
    module = made(Program)
    fit(module, FP8Precision("delayed"), tmp_path, max_epochs=2)
    assert output_error(module, rows(8) * 100) < 0.08


def test_formats_of_high_precision_go_on_after_revert() -> None:
    module = made(Program)
    table: PrecisionMap = convert(module, "fp8-delayed").precision_map
    revert(module)
    table.step()
    assert type(module.body[0]) is nn.Linear


def step_in_fabric(plugin: Any) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=plugin)
    model = nn.Sequential(nn.Linear(32, 16))
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward(model(rows(8)).float().sum())
    optimizer.step()


@pytest.mark.compatibility(
    "wrappers", "a Trainer's plugin in Fabric", "refused", "the error has the line to take instead"
)
@pytest.mark.parametrize("plugin", [lambda: FP8Precision("delayed"), lambda: FP16Precision()])
def test_fabric_is_told_what_to_take_instead(plugin: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="Fabric"):
        step_in_fabric(plugin())


FUNCTIONS = ["grad", "jvp", "per sample", "vmap"]


@pytest.mark.compatibility(
    "wrappers", "torch.func, vmap, forward mode, per-sample gradients", "works"
)
@pytest.mark.parametrize("format", ["bf16", "fp8-delayed", "fp8-dynamic", "fp8-rowwise", "mxfp8"])
@pytest.mark.parametrize("what", FUNCTIONS)
def test_function_transforms_are_those_of_the_plain_model(format: str, what: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    x = rows(8)

    def transformed() -> Tensor:
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(model, parameters, (x,)).float().square().mean()

        if what == "grad":
            return grad(loss)(parameters, x)["0.weight"]
        if what == "per sample":
            each = vmap(grad(lambda p, row: loss(p, row[None])), (None, 0))
            return each(parameters, x)["0.weight"]
        if what == "jvp":
            return jvp(lambda x: functional_call(model, parameters, (x,)), (x,), (x.sign(),))[1]
        return vmap(lambda row: functional_call(model, parameters, (row[None],)))(x)

    expected = transformed()
    convert(model, "high", layers={"*": format})
    assert error(transformed(), expected) < 0.12


@pytest.mark.compatibility(
    "wrappers", "meta device, `to_empty`, `load_state_dict(assign=True)`", "works"
)
@pytest.mark.parametrize("how", ["assign", "to_empty"])
@pytest.mark.parametrize("format", ["fp8-delayed", "fp8-dynamic"])
def test_a_model_converted_on_the_meta_device_trains(how: str, format: str) -> None:
    kept = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    report = convert(model, format)
    if how == "to_empty":
        model.to_empty(device="cpu")
    model.load_state_dict(kept.state_dict(), assign=how == "assign")
    for _ in range(3):
        output = model(rows(8))
        output.sum().backward()
        report.precision_map.step()
    assert error(output.detach(), kept(rows(8)).detach()) < 0.1


@pytest.mark.compatibility(
    "wrappers", "summaries and rules that compare `type(module).__name__`", "works"
)
@pytest.mark.parametrize("format", ["high", "fp8-dynamic"])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_layer_is_of_the_class_it_was_by_name(format: str, lazy: bool) -> None:
    model = L.LightningModule()
    model.layer = nn.LazyLinear(16) if lazy else nn.Linear(32, 16)
    model.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    names = [type(module).__name__ for module in model.modules()]
    convert(model, layers={"*": format})
    assert [type(module).__name__ for module in model.modules()] == names
    assert isinstance(model.layer, FPLinear)
    assert ("FPLinear(" in repr(model)) == (format != "high")
    assert type(pickle.loads(pickle.dumps(model.layer))) is type(model.layer)
    assert ModelSummary(model).layer_types == names[1:3]


@pytest.mark.compatibility(
    "wrappers", "names behind DDP, Fabric and `torch.compile` prefixes", "works"
)
@pytest.mark.parametrize("prefix", ["_forward_module", "_orig_mod"])
def test_rules_match_the_users_names_behind_a_wrapper(prefix: str) -> None:
    model = nn.Module()
    model.add_module(prefix, nn.ModuleDict({"body": nn.Linear(32, 32), "out": nn.Linear(32, 16)}))
    report = convert(model, "fp8-dynamic", layers={"out": "bf16"})
    assert {row.name: row.format for row in report.layers} == {
        "body": "fp8-dynamic",
        "out": "bf16",
    }
