"""The fallback under FP16: to bf16 at run time where FP16's range does not suffice, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_fp import PrecisionFallback
from lightning_fp.callbacks.compare.step_replay import StepReplay
from lightning_fp.demo import ByteBatches
from lightning_fp.plugins import FP16Precision
from lightning_fp.records import read_events
from lightning_fp.stability.detect.overflow_watch import STORM, WINDOW, OverflowState, OverflowWatch
from lightning_fp.stability.loss_scaling import LossScaling
from lightning_fp.stability.respond.fallback_policy import FallbackPolicy
from tests.helper import CONTEXT, LanguageModel, fit, make_trainer, same_weights, text_rows


class TooLarge(LanguageModel):
    """For some steps the head's input, or its gradient, is beyond FP16 and well within bf16."""

    def __init__(self, steps: range, *, forward: bool) -> None:
        super().__init__()
        self.bad, self.large = steps, forward
        self.dtypes: list[torch.dtype] = []
        self.model.lm_head.register_forward_pre_hook(self.before)
        self.model.lm_head.register_forward_hook(self.after)

    def factor(self) -> float:
        return 1e6 if self.training and self.trainer.global_step in self.bad else 1.0

    def before(self, module: Any, args: tuple[Tensor]) -> Tensor:
        return args[0].float() * (self.factor() if self.large else 1.0)

    def after(self, module: Any, args: Any, output: Tensor) -> Tensor:
        self.dtypes.append(output.dtype)
        return output.float() / (self.factor() if self.large else 1.0)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        return loss if self.large else loss * self.factor()


def run(model: LanguageModel, directory: Path, scaling: LossScaling, steps: int) -> FP16Precision:
    fallback = PrecisionFallback(
        policy=FallbackPolicy(hold=8), probe_every_n_steps=None, dirpath=directory
    )
    plugin = FP16Precision(loss_scaling=scaling)
    fit(plugin, model, max_steps=steps, callbacks=[fallback])
    return plugin


def test_a_loss_that_overflows_turns_the_run_to_bf16_and_back(tmp_path: Path) -> None:
    model = TooLarge(range(6, 15), forward=True)
    scaling = LossScaling(init_scale=2.0**12, growth_interval=4)
    plugin = run(model, tmp_path, scaling, steps=24)
    events = read_events(tmp_path)
    kinds = [event.kind for event in events]
    assert kinds.count("skip") == 4
    assert kinds.count("demote") == kinds.count("promote") == 1
    assert "rollback" not in kinds
    demotion = next(event for event in events if event.kind == "demote")
    assert set(demotion.formats.values()) == {("fp16", "bf16")}
    assert len(demotion.formats) == 9
    verdict = next(event for event in events if event.kind == "verdict")
    assert "no loss scale mends; in bf16 they are finite" in verdict.reason
    assert torch.bfloat16 in model.dtypes
    assert model.dtypes[-1] is torch.float16  # after probation
    assert set(plugin.precision_map.formats().values()) == {"fp16"}
    assert plugin.scaler is not None
    assert float(plugin.scaler.state.scale) >= 2.0**12  # begins anew, and has grown since
    assert all(map(torch.isfinite, map(torch.tensor, model.losses[10:])))


def test_gradients_that_overflow_at_the_least_scale_turn_the_run_to_bf16(tmp_path: Path) -> None:
    model = TooLarge(range(6, 99), forward=False)
    scaling = LossScaling(init_scale=8, min_scale=4, hysteresis=1)
    plugin = run(model, tmp_path, scaling, steps=12)
    events = read_events(tmp_path)
    suspicion = next(event for event in events if event.kind == "suspect")
    assert suspicion.reason == "gradients overflow even at the smallest loss scale"
    assert set(plugin.precision_map.formats().values()) == {"bf16"}
    assert plugin.half_dtype is torch.bfloat16
    assert model.dtypes[-1] is torch.bfloat16


def test_a_scale_that_looks_for_its_level_is_no_incident(tmp_path: Path) -> None:
    scaling = LossScaling(init_scale=2.0**24, growth_interval=8)
    plugin = run(LanguageModel(), tmp_path, scaling, steps=24)
    kinds = [event.kind for event in read_events(tmp_path)]
    assert kinds.count("skip") > 4
    assert "suspect" not in kinds
    assert set(plugin.precision_map.formats().values()) == {"fp16"}


class Saves(L.Callback):
    """Saves a checkpoint after each of some steps."""

    def __init__(self, directory: Path, steps: tuple[int, ...]) -> None:
        self.directory, self.steps = directory, steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.directory / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("step", [8, 13, 20], ids=["skipping", "in bf16", "back in fp16"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, step: int) -> None:
    def train(directory: Path, ckpt: Path | None = None) -> tuple[TooLarge, FP16Precision]:
        text = text_rows(3000).flatten()
        batches = ByteBatches(text, batches=24, batch_size=4, context=CONTEXT, seed=0)
        fallback = PrecisionFallback(
            policy=FallbackPolicy(hold=8), probe_every_n_steps=None, dirpath=directory
        )
        plugin = FP16Precision(loss_scaling=LossScaling(init_scale=2.0**12, growth_interval=4))
        callbacks = [fallback] if ckpt else [fallback, Saves(tmp_path, (step,))]
        model = TooLarge(range(6, 15), forward=True)
        trainer = make_trainer(plugin, max_epochs=1, callbacks=callbacks)
        trainer.fit(model, batches, ckpt_path=ckpt)
        return model, plugin

    whole, plugin = train(tmp_path / "whole")
    resumed, other = train(tmp_path / "resumed", tmp_path / f"{step}.ckpt")
    assert same_weights(whole, resumed)
    assert plugin.scaler is not None
    assert other.scaler is not None
    assert plugin.scaler.state.numbers() == other.scaler.state.numbers()
    assert plugin.precision_map.formats() == other.precision_map.formats()
    told = [(e.step, e.kind) for e in read_events(tmp_path / "whole") if e.step > step]
    again = [(e.step, e.kind) for e in read_events(tmp_path / "resumed") if e.step > step]
    assert told == again
    assert {kind for _, kind in told} >= ({"promote"} if step < 18 else set())


class Replays(L.Callback):
    """Replays each step before it is made, and keeps both gradients."""

    def __init__(self) -> None:
        self.replayed: list[list[Tensor | None]] = []
        self.made: list[list[Tensor]] = []
        self.scales: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        plugin: Any = trainer.precision_plugin
        if plugin.precision_map.frozen:  # in a replay of its own
            return
        replay = StepReplay(trainer, plugin.precision_map, args[1], args[2])
        before = plugin.scaler.state.numbers()
        low, high = replay({}), replay(dict.fromkeys(plugin.low_layers(), plugin.high_precision))
        assert plugin.scaler.state.numbers() == before
        assert low.loss is not None
        assert high.loss is not None
        assert low.loss != high.loss  # the base goes along with the layers
        self.replayed.append(list(low.gradients))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.made.append(
            [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]
        )


@pytest.mark.parametrize("base", ["16-mixed", "16-true"])
def test_a_replay_has_the_steps_own_gradients(base: Any) -> None:
    seen = Replays()
    scaling = LossScaling(init_scale=2.0**10, growth_interval=1)
    fit(FP16Precision(base, loss_scaling=scaling), LanguageModel(), max_steps=3, callbacks=[seen])
    for replayed, made in zip(seen.replayed, seen.made, strict=True):
        for a, b in zip(replayed, made, strict=True):
            assert a is not None
            assert torch.equal(a, b)


# -- the watch ----------------------------------------------------------------------------------


def reasons(pattern: list[bool], scaling: LossScaling | None = None, **step: bool) -> list[str]:
    watch, state = OverflowWatch(scaling or LossScaling(), patience=3), OverflowState()
    found: list[str] = []
    for skipped in pattern:
        options = {"loss_finite": True, "stuck": False, **step}
        state, reason = watch.step(state, skipped=skipped, **options)
        found += [] if reason is None else [reason]
    return found


def test_what_is_an_incident_and_what_is_not() -> None:
    assert not reasons([True] * 20)  # the scale looks for its level
    assert not reasons([False, *[True] * 5, False])
    assert "6 times in a row" in reasons([False, *[True] * 6])[0]
    assert "no loss scale mends" in reasons([True] * 4, loss_finite=False)[0]
    assert "smallest loss scale" in reasons([True], stuck=True)[0]
    storm = [False, *[step % 4 == 0 for step in range(WINDOW)]]
    assert f"{STORM + 1} of the last" in reasons(storm)[0]
    assert not reasons(storm, LossScaling(growth_interval=4))  # as often as it grows
    assert not reasons([False, *[step % 10 == 0 for step in range(5 * WINDOW)]])
