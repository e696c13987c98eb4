"""The guard before the optimizer's step: skips what is not finite, and changes nothing else."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_fp import FP8Precision
from lightning_fp.plugins.guard import StepGuard
from tests.helper import LanguageModel, fit, next_byte_loss, same_weights


def guarded(**options: Any) -> FP8Precision:
    plugin = FP8Precision("dynamic", base="32-true", **options)
    plugin.guard = StepGuard()
    return plugin


class Poisoned(LanguageModel):
    """The loss of some steps is NaN; a scheduler counts."""

    def __init__(self, bad: tuple[int, ...] = (), optimizer: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.bad = bad
        self.make = optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-2))
        self.rates: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        loss = super().training_step(batch, index)
        return loss * float("nan") if index in self.bad else loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


@pytest.mark.parametrize(
    "options", [{}, {"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 2}]
)
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_nothing_changes_where_nothing_is_wrong(options: dict[str, Any], clip: str) -> None:
    options = {**options, "max_steps": 6, "gradient_clip_algorithm": clip}
    plain = fit(FP8Precision("dynamic", base="32-true"), Poisoned(), **options)
    plugin = guarded()
    watched = fit(plugin, Poisoned(), **options)
    assert same_weights(plain, watched)
    assert plain.rates == watched.rates
    assert plugin.guard is not None
    assert len(plugin.guard.steps) == 6
    assert not any(bool(step.skipped) for step in plugin.guard.steps)


@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.5}])
def test_the_norm_is_that_before_clipping(clip: dict[str, Any]) -> None:
    norms: list[float] = []

    class Norms(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    plugin = guarded()
    fit(plugin, Poisoned(), max_steps=4, callbacks=[Norms()], **clip)
    assert plugin.guard is not None
    assert [float(step.grad_norm) for step in plugin.guard.steps] == norms


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_a_bad_step_is_left_out_and_the_scheduler_waits(fused: bool, clip: str) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, fused=fused)

    plugin = guarded()
    options = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": clip}
    model = fit(plugin, Poisoned((2,), make), max_steps=5, **options)
    assert plugin.guard is not None
    assert [bool(step.skipped) for step in plugin.guard.steps] == [False, False, True, False, False]
    assert model.trainer.global_step == 5
    assert model.rates == [1e-2, 5e-3, 2.5e-3, 2.5e-3, 1.25e-3]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    state = model.trainer.optimizers[0].state_dict()["state"]
    assert all(entry["step"] == 4 for entry in state.values())
    scheduler = model.trainer.lr_scheduler_configs[0]
    assert scheduler.frequency == 1
    assert "step" not in vars(scheduler.scheduler)


def test_a_skipped_step_is_as_if_it_had_not_been() -> None:
    class Without(Poisoned):
        def training_step(self, batch: Tensor, index: int) -> Any:
            return None if index == 2 else super().training_step(batch, index)

    # in the other run the third batch is never stepped with, and the scheduler goes on
    skipped = fit(guarded(), Poisoned((2,)), max_steps=4)
    reference = LanguageModel()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    from tests.helper import text_loader

    other = FP8Precision("dynamic", base="32-true")
    other.convert_module(reference)
    for index, batch in enumerate(text_loader()):
        if index == 4:
            break
        if index == 2:
            continue
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * 0.5 ** min(index, 2 if index == 3 else index)
        optimizer.zero_grad()
        next_byte_loss(reference, batch).backward()
        other.precision_map.step()
        optimizer.step()
    assert same_weights(skipped, reference)


def test_manual_optimization_with_two_optimizers() -> None:
    class Manual(Poisoned):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, index: int) -> None:
            first, second = self.optimizers()
            loss = next_byte_loss(self, batch)
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(loss * (float("nan") if index == 1 else 1.0))
            first.step()
            second.step()
            for scheduler in self.lr_schedulers():
                scheduler.step()
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

        def configure_optimizers(self) -> Any:
            parameters = list(self.parameters())
            optimizers = [
                torch.optim.SGD(parameters[:5], 0.1),
                torch.optim.SGD(parameters[5:], 0.1),
            ]
            return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]

    plugin = guarded()
    model = fit(plugin, Manual(), max_steps=6)
    assert plugin.guard is not None
    assert [bool(step.skipped) for step in plugin.guard.steps] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    assert model.rates == [0.05, 0.05, 0.025]
    assert all("step" not in vars(c.scheduler) for c in model.trainer.lr_scheduler_configs)


def test_lbfgs_steps_unguarded(caplog: pytest.LogCaptureFixture) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)

    plain = fit(FP8Precision("dynamic", base="32-true"), Poisoned((), make), max_steps=2)
    plugin = guarded()
    watched = fit(plugin, Poisoned((), make), max_steps=2)
    assert same_weights(plain, watched)
    assert plugin.guard is not None
    assert not plugin.guard.steps
    assert sum("LBFGS calls its closure itself" in r.message for r in caplog.records) == 1
