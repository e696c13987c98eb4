"""Fabric: plugins of its own, a loop with a Fabric handed in, and the Trainer's plugin refused."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import nn

import lightning_fp.fabric
from lightning_fp import FP8Precision, FP16Precision, LossScaling, convert
from lightning_fp.loop import PrecisionLoop
from tests.helper import TinyGPT, next_byte_loss, text_rows

STEPS = 6


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


def gpt() -> tuple[TinyGPT, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = TinyGPT()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def in_a_loop(scaling: Any, **options: Any) -> nn.Module:
    model, optimizer = gpt()
    loop = PrecisionLoop(model, optimizer, scaling, clip_norm=0.5, **options)
    for batch in text_rows(8 * STEPS).split(8):
        loop.step(lambda b: next_byte_loss(model, b), batch)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("plugin", [FP8Precision("delayed"), FP16Precision()])
def test_a_trainers_plugin_is_refused(plugin: Precision) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=plugin)
    model = network()
    with pytest.raises(ValueError, match="in Fabric: it is a Trainer's plugin") as error:
        fabric.setup(model, torch.optim.AdamW(model.parameters()))
    assert "take lightning_fp.fabric.FP" in str(error.value)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("scaling", "base"),
    [("delayed", "bf16-mixed"), ("dynamic", "bf16-true"), ("delayed", "16-mixed")],
)
def test_a_plugin_of_fabrics_makes_the_loops_steps(scaling: Any, base: Any) -> None:
    plugin = lightning_fp.fabric.FP8Precision(scaling, base=base)
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=plugin)
    model, optimizer = gpt()
    module, wrapped = fabric.setup(model, optimizer)
    for batch in text_rows(8 * STEPS).split(8):
        wrapped.zero_grad()
        fabric.backward(next_byte_loss(module, batch))
        fabric.clip_gradients(module, wrapped, max_norm=0.5, error_if_nonfinite=False)
        wrapped.step()
    assert same(model, in_a_loop(scaling, base=base, fallback=False))
    assert set(plugin.precision_map.formats().values()) >= {f"fp8-{scaling}"}
    module.eval()
    with torch.no_grad():
        high = module(text_rows(4)[:, :-1])
    module.train()
    with plugin.as_trained(), torch.no_grad():
        low = module(text_rows(4)[:, :-1])
    assert not torch.equal(high, low)


def test_weights_are_cast_from_their_bf16_export() -> None:
    plugin = lightning_fp.fabric.FP8Precision("block", quantise_like="bf16-export")
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=plugin)
    model = network()
    fabric.setup(model, torch.optim.AdamW(model.parameters()))
    assert set(plugin.precision_map.formats().values()) == {"fp8-block[quantise_like=bf16-export]"}


def test_fp16_leaves_steps_out_and_a_state_goes_through_a_checkpoint() -> None:
    scaling = LossScaling(init_scale=2.0**24)
    plugin = lightning_fp.fabric.FP16Precision(loss_scaling=scaling)
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=plugin)
    model, optimizer = gpt()
    module, wrapped = fabric.setup(model, optimizer)
    for batch in text_rows(8 * 16).split(8):
        wrapped.zero_grad()
        fabric.backward(next_byte_loss(module, batch))
        wrapped.step()
    assert 0 < plugin.skipped < 16
    other = lightning_fp.fabric.FP16Precision(loss_scaling=scaling)
    again, _ = gpt()
    L.Fabric(accelerator="cpu", devices=1, plugins=other).setup(again)
    other.load_state_dict(plugin.state_dict())
    assert str(other.state_dict()) == str(plugin.state_dict())


@pytest.mark.parametrize("base", ["bf16-mixed", "16-mixed"])
def test_a_loop_with_a_fabric_makes_the_same_steps(base: Any) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    model, optimizer = gpt()
    module, wrapped = fabric.setup(model, optimizer)
    loop = PrecisionLoop(module, wrapped, "delayed", base=base, clip_norm=0.5, fabric=fabric)
    for batch in text_rows(8 * STEPS).split(8):
        loop.step(lambda b: next_byte_loss(module, b), batch)
    assert same(model, in_a_loop("delayed", base=base))


def test_a_fabric_with_a_precision_of_its_own_is_refused() -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model, optimizer = gpt()
    module, wrapped = fabric.setup(model, optimizer)
    with pytest.raises(ValueError, match="fabric must have precision '32-true'"):
        PrecisionLoop(module, wrapped, fabric=fabric)


def test_a_plugin_needs_a_model_and_takes_one() -> None:
    plugin = lightning_fp.fabric.FP8Precision()
    with pytest.raises(ValueError, match="has no model yet"):
        plugin.precision_map.formats()
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=plugin)
    fabric.setup(network())
    with pytest.raises(ValueError, match="has a model already"):
        fabric.setup(network())
    with pytest.raises(ValueError, match="base must be '16-mixed' or '16-true'"):
        lightning_fp.fabric.FP16Precision("bf16-mixed")


def test_convert_serves_fabric_as_well() -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = network()
    report = convert(model, "fp8-delayed")
    module, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        loss = module(torch.randn(16, 32)).float().square().mean()
        fabric.backward(loss)
        fabric.clip_gradients(module, optimizer, max_norm=1.0)
        optimizer.step()
        report.precision_map.step()
    assert report.precision_map.formats() == {"0": "fp8-delayed", "2": "fp8-delayed"}
    assert len(report.precision_map.scale_history) == 2
    assert loss.isfinite()
