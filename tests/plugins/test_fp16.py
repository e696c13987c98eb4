"""FP16 training: the loss scale's course, skipped steps, float32 masters, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_fp.plugins.fp16 import FP16Precision
from lightning_fp.stability.loss_scaling import LossScaling
from tests.helper import LanguageModel, fit, make_trainer, same_weights, text_loader

QUICK = LossScaling(init_scale=2.0**20, growth_interval=3, hysteresis=1)
"""Overflows at first, and grows into overflow again after a few steps."""


class Watched(LanguageModel):
    """Remembers scale, rates and gradient norms, with a scheduler that counts."""

    def __init__(self, optimizer: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.make = optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-2))
        self.rates: list[float] = []
        self.scales: list[float] = []
        self.norms: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        scaler: Any = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            state = getattr(scaler, "state", None)
            self.scales.append(float(scaler.get_scale() if state is None else state.scale))
        return super().training_step(batch, index)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.5},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    ],
)
def test_the_course_is_that_of_torchs_grad_scaler(options: dict[str, Any]) -> None:
    torchs = torch.amp.GradScaler(  # pyright: ignore
        "cpu", init_scale=QUICK.init_scale, growth_interval=3
    )
    options = {**options, "max_steps": 12}
    theirs = fit(MixedPrecision("16-mixed", "cpu", scaler=torchs), Watched(), **options)
    plugin = FP16Precision(loss_scaling=QUICK, hold_schedulers=False)
    ours = fit(plugin, Watched(), **options)
    assert ours.scales == theirs.scales
    assert len(set(ours.scales)) > 3
    assert same_weights(ours, theirs)
    assert ours.rates == theirs.rates
    assert plugin.scaler is not None
    assert float(plugin.scaler.state.scale) == torchs.get_scale()


def test_schedulers_wait_and_skips_are_counted() -> None:
    plugin = FP16Precision(loss_scaling=QUICK)
    model = fit(plugin, Watched(), max_steps=10)
    assert plugin.scaler is not None
    state = plugin.scaler.state.numbers()
    falls = sum(b < a for a, b in zip(model.scales, model.scales[1:], strict=False))
    assert state["skipped"] >= falls > 1
    assert state["made"] + state["skipped"] == 10
    assert model.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(
        1e-2 * 0.9 ** state["made"]
    )


def test_hooks_see_gradients_without_the_scale() -> None:
    calm = LossScaling(init_scale=2.0**12)
    half = fit(FP16Precision(loss_scaling=calm), Watched(), max_steps=2)
    full = Watched()
    make_trainer(None, max_steps=2, precision="32-true").fit(full, text_loader())
    assert half.norms == pytest.approx(full.norms, rel=0.05)
