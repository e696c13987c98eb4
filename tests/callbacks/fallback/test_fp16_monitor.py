"""FP16Monitor against counting by hand, and the layer that overflows first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_fp import FP8Precision
from lightning_fp.callbacks.fallback.fp16_monitor import FP16Monitor
from lightning_fp.plugins import FP16Precision
from lightning_fp.records import read_events
from lightning_fp.records.gradients import read_gradients
from lightning_fp.stability.loss_scaling import LossScaling
from tests.helper import LanguageModel, fit


class ByHand(L.Callback):
    """Each step's gradients of one layer, without the scale."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(pl_module.model.blocks[0].fc1.weight.grad.clone())


def test_shares_are_those_counted_by_hand(tmp_path: Path) -> None:
    seen = ByHand()
    plugin = FP16Precision(loss_scaling=LossScaling.static(2.0**-6))
    fit(plugin, max_steps=5, callbacks=[seen, FP16Monitor(2, dirpath=tmp_path)])
    rows = read_gradients(tmp_path)
    assert [row.step for row in rows] == [0, 2, 4]
    for row in rows:
        shares = row.layers["model.blocks.0.fc1"]
        weight = seen.gradients[row.step].abs() / 64
        bias = plugin.precision_map.layers["model.blocks.0.fc1"].out_features
        small = ((weight > 0) & (weight < 2**-14)).sum() / weight.numel()
        assert shares.subnormal == pytest.approx(
            float(small), abs=bias / weight.numel()
        )  # the bias counts as well
        assert shares.subnormal > 0.3
        assert shares.overflow == 0
    assert {"model.embed", "model.lm_head"} < set(rows[0].layers)


class Large(LanguageModel):
    """At step 3 the gradient of one block's output is beyond FP16."""

    def on_fit_start(self) -> None:
        def enlarge(gradient: Tensor) -> Tensor:
            return gradient * (1e12 if self.trainer.global_step == 3 else 1)

        def hook(module: Any, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(enlarge)

        self.model.blocks[0].fc2.register_forward_hook(hook)


def test_a_skip_names_the_layer_that_overflowed_first(tmp_path: Path) -> None:
    plugin = FP16Precision(loss_scaling=LossScaling(init_scale=2.0**10))
    fit(plugin, Large(), max_steps=5, callbacks=[FP16Monitor(dirpath=tmp_path)])
    skips = [event for event in read_events(tmp_path) if event.kind == "skip"]
    assert [(event.step, event.layers) for event in skips] == [(3, ("model.blocks.0.fc2",))]
    assert "overflowed first" in skips[0].reason


def test_it_needs_a_loss_scale() -> None:
    with pytest.raises(ValueError, match="needs a plugin that scales the loss"):
        fit(FP8Precision(), max_steps=1, callbacks=[FP16Monitor()])
    with pytest.raises(ValueError, match="every_n_steps must be at least 1"):
        FP16Monitor(0)
    assert torch.finfo(torch.float16).tiny == 2**-14
