"""What a run records of its steps, in automatic and in manual optimization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fp import (
    ClampMonitor,
    EvaluationGap,
    FP8Precision,
    Gate,
    PrecisionFallback,
    RolloutRecipe,
    Stage,
    StagedRollout,
)
from lightning_fp.callbacks import LossRecorder
from lightning_fp.callbacks.run.run import Run, run_of
from lightning_fp.records import GateResult, read_events, read_steps
from tests.helper import LanguageModel, fit, make_trainer, supervisor_of, text_loader


class Gan(L.LightningModule):
    """Two optimizers, each with a loss of its own; the training step returns none."""

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32))
        self.discriminator = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
        self.accumulate = accumulate
        self.given: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> None:
        of_generator, of_discriminator = self.optimizers()
        noise, real = batch[:, :16], batch[:, 16:]
        fake = self.generator(noise)
        last = (index + 1) % self.accumulate == 0
        self.descend(of_discriminator, self.score(real) - self.score(fake.detach()), last)
        self.descend(of_generator, self.score(fake), last)

    def score(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(self.discriminator(x)).mean()

    def descend(self, optimizer: Any, loss: Tensor, last: bool) -> None:
        self.given.append(loss.item())
        self.manual_backward(loss)
        if last:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        halves = (self.generator, self.discriminator)
        return [torch.optim.SGD(half.parameters(), lr=0.1) for half in halves]


def train_gan(plugin: Any, *callbacks: L.Callback, accumulate: int = 1) -> Gan:
    torch.manual_seed(1)
    model = Gan(accumulate)
    trainer = make_trainer(plugin, max_epochs=1, callbacks=list(callbacks))
    trainer.fit(model, DataLoader(torch.rand(6, 8, 48) - 0.5, batch_size=None))
    return model


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("who", ["recorder", "monitor", "both"])
def test_a_gan_has_a_loss_curve(who: str, accumulate: int, tmp_path: Path) -> None:
    recorder, monitor = LossRecorder(tmp_path), ClampMonitor(dirpath=tmp_path)
    callbacks = {"recorder": [recorder], "monitor": [monitor], "both": [recorder, monitor]}[who]
    plugin = (
        None if who == "recorder" else FP8Precision(base="32-true", layers={"*": "fp8-dynamic"})
    )
    model = train_gan(plugin, *callbacks, accumulate=accumulate)
    given, width = model.given, 2 * accumulate
    sums = [sum(given[at : at + width]) for at in range(0, len(given), width)]
    table = read_steps(tmp_path)
    assert table["loss"].to_pylist() == pytest.approx(sums, rel=1e-5, abs=1e-6)
    # two optimizers step, and the count of optimizer steps has both
    assert table["step"].to_pylist() == [1 + 2 * at for at in range(len(sums))]
    norms = table["grad_norm"].to_pylist()
    assert all(norm is None for norm in norms) if who == "monitor" else min(norms) > 0


def test_a_gans_loss_is_not_scaled(tmp_path: Path) -> None:
    """Lightning's own FP16 shows hooks the scaled one."""
    curves: list[list[float]] = []
    for name, plugin in (
        ("float32", None),
        ("fp16", MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))),
    ):
        train_gan(plugin, LossRecorder(tmp_path / name))
        curves.append(read_steps(tmp_path / name)["loss"].to_pylist())
    assert curves[1] == pytest.approx(curves[0], rel=1e-2, abs=1e-2)


def test_the_fallback_sees_the_loss_of_a_gan(tmp_path: Path) -> None:
    class Keeps(L.Callback):
        losses: list[float | None] = []  # noqa: RUF012

        def on_train_end(self, *_: Any) -> None:
            self.losses = [step.loss for step in supervisor_of(fallback).ring.since(0)[:-1]]

    fallback, keeps = PrecisionFallback(dirpath=tmp_path), Keeps()
    plugin = FP8Precision(base="32-true", layers={"*": "fp8-dynamic"})
    model = train_gan(plugin, fallback, keeps)
    sums = [a + b for a, b in zip(model.given[::2], model.given[1::2], strict=True)]
    assert keeps.losses == pytest.approx(sums[:-1], rel=1e-5, abs=1e-6)


class Looks(L.Callback):
    """Reads the record of each step, as any callback may."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float, float | None, float | None, bool]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        last = run_of(trainer).last
        if last is not None and (not self.steps or self.steps[-1][0] != last.step):
            norm = None if last.grad_norm is None else float(last.grad_norm)
            skipped = any(bool(skipped) for skipped in last.skipped)
            self.steps.append((last.step, float(last.loss), norm, last.lr, skipped))


@pytest.mark.parametrize("guarded", [False, True])
def test_the_record_of_a_step_has_everything(guarded: bool, tmp_path: Path) -> None:
    class Breaks(LanguageModel):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss = super().training_step(batch, index)
            return loss * float("nan") if self.global_step == 2 and guarded else loss

    looks = Looks()
    watching = PrecisionFallback(dirpath=tmp_path) if guarded else LossRecorder(tmp_path)
    model = fit(
        FP8Precision(),
        Breaks(),
        max_steps=4,
        accumulate_grad_batches=2,
        callbacks=[watching, looks],
    )
    steps, losses, norms, rates, skipped = zip(*looks.steps, strict=True)
    assert steps == (0, 1, 2, 3)
    means = [(a + b) / 2 for a, b in zip(model.losses[::2], model.losses[1::2], strict=True)]
    sound = [0, 1, 3] if guarded else [0, 1, 2, 3]
    assert [losses[at] for at in sound] == pytest.approx([means[at] for at in sound], rel=1e-6)
    assert all(norms[at] > 0 for at in sound)
    assert set(rates) == {1e-3}
    assert skipped == (False, False, guarded, False)


def test_a_gate_reads_the_board_and_asks_nobody(tmp_path: Path) -> None:
    """Whoever publishes under the name: here a callback that measures nothing."""

    class Says(EvaluationGap):
        def cannot_measure(self, *_: Any) -> str:
            return ""

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            step = trainer.global_step
            run_of(trainer).board.publish("precision/eval_gap", step, 1.0 if step < 5 else 0.0)

    gate = Gate(statistic="eval_gap", below=0.5, window=2)
    recipe = RolloutRecipe(
        name="two",
        stages=(
            Stage(name="high", layers={"*": "high"}, gates=(gate,)),
            Stage(name="low", layers={"*": "configured"}),
        ),
    )
    callbacks = [Says(dirpath=tmp_path), StagedRollout(recipe)]
    fit(FP8Precision(), max_steps=10, callbacks=callbacks)
    results = [e for e in read_events(tmp_path) if isinstance(e, GateResult)]
    assert [(e.step, e.passed) for e in results] == [(2, False), (6, True)]


def test_one_run_stands_before_the_callbacks_of_a_fit(tmp_path: Path) -> None:
    callbacks: list[L.Callback] = [L.Callback(), LossRecorder(tmp_path)]
    trainer = make_trainer(None, max_steps=2, callbacks=callbacks)
    runs: list[Run] = []
    for steps in (2, 4):
        trainer.fit_loop.epoch_loop.max_steps = steps
        trainer.fit(LanguageModel(), text_loader())
        runs.append(run_of(trainer))
        assert trainer.callbacks[0] is runs[-1]
        assert sum(isinstance(callback, Run) for callback in trainer.callbacks) == 1
    assert runs[0] is not runs[1]
    assert read_steps(tmp_path)["step"].to_pylist() == [1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="there is no run before the setup of a fit"):
        run_of(make_trainer(None))
