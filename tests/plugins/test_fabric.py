"""A Trainer's plugin in Fabric is refused at the first forward, with what to do instead."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import nn

from lightning_fp import FP8Precision, FP16Precision, convert


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


@pytest.mark.parametrize("plugin", [FP8Precision("delayed"), FP16Precision()])
def test_a_trainers_plugin_is_refused(plugin: Precision) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=plugin)
    model = network()
    module, _ = fabric.setup(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="in Fabric: it is a Trainer's plugin") as error:
        module(torch.randn(16, 32))
    assert "lightning_fp.convert(model, " in str(error.value)


def test_what_the_message_says_instead() -> None:
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
