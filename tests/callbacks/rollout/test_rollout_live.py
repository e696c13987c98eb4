"""Rollouts whose gates are answered by the callbacks of the other chapters, in real runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_fp import (
    EvaluationGap,
    FP8Precision,
    FP16Precision,
    Gate,
    MismatchMonitor,
    RolloutRecipe,
    Stage,
    StagedRollout,
    recipes,
)
from lightning_fp.records import GateResult, StageChange, read_events
from tests.helper import LanguageModel, make_trainer, next_byte_loss, text_loader


class Parting:
    """An engine that agrees with training until a step, and never again."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, trainer: L.Trainer, module: L.LightningModule, batch: Tensor) -> Any:
        scores = module(batch[:, :-1]).float().log_softmax(dim=-1)
        train = scores.gather(2, batch[:, 1:].unsqueeze(2)).squeeze(2)
        off = 0.5 if trainer.global_step >= self.step else 1e-4
        return train - off, train, torch.ones_like(batch[:, 1:])


class Validated(LanguageModel):
    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return next_byte_loss(self, batch)


class Halves(L.Callback):
    """Notes what the base computes in, and the scale, at each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.dtype, float]] = []

    def on_before_backward(self, trainer: L.Trainer, module: Any, loss: Tensor) -> None:
        plugin = trainer.precision_plugin
        self.seen.append((plugin.half_dtype, float(plugin.scaler.state.scale)))


def test_fp16_while_training_and_inference_agree(tmp_path: Path) -> None:
    halves = Halves()
    trainer = make_trainer(
        FP16Precision(),
        max_steps=16,
        log_every_n_steps=1,
        callbacks=[
            MismatchMonitor(Parting(8), act="log", dirpath=tmp_path),
            StagedRollout(recipes.get("fp16-rl", window=4)),
            halves,
        ],
    )
    trainer.fit(LanguageModel(), text_loader())
    dtypes = [dtype for dtype, _ in halves.seen]
    stages = [(e.step, e.stage) for e in read_events(tmp_path) if isinstance(e, StageChange)]
    assert stages[:2] == [(0, "bf16"), (4, "fp16")]
    back, name = stages[2]
    assert name == "bf16"
    assert 9 <= back <= 12
    assert dtypes[:4] == [torch.bfloat16] * 4
    assert dtypes[4:back] == [torch.float16] * (back - 4)
    assert dtypes[back : back + 4] == [torch.bfloat16] * 4  # then it tries again
    assert halves.seen[4][1] == 2.0**16


@pytest.mark.parametrize(("below", "goes_on"), [(1.0, True), (-1.0, False)])
def test_the_evaluation_gap_as_a_gate(tmp_path: Path, below: float, goes_on: bool) -> None:
    gate = Gate(statistic="eval_gap", below=below, window=8, reduce="last")
    layers = {"*": "configured"}
    recipe = RolloutRecipe(
        name="gap",
        stages=(
            Stage(name="first", layers={"*blocks.0.*": "configured", "*": "high"}, gates=(gate,)),
            Stage(name="all", layers=layers),
        ),
    )
    rollout = StagedRollout(recipe)
    trainer = make_trainer(
        FP8Precision("dynamic", base="32-true"),
        max_steps=12,
        log_every_n_steps=1,
        val_check_interval=4,
        limit_val_batches=2,
        callbacks=[EvaluationGap(dirpath=tmp_path), rollout],
    )
    trainer.fit(Validated(), text_loader(), text_loader(16))
    assert rollout.stage == ("all" if goes_on else "first")
    (asked,) = [event for event in read_events(tmp_path) if isinstance(event, GateResult)]
    assert asked.passed == goes_on
    assert math.isfinite(asked.numbers["value"])
