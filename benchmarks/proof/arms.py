"""What a run may be protected by: nothing, the rivals, the fallback, and that with less memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from benchmarks.proof.activation_bound import ActivationBound
from lightning_fp import PrecisionFallback
from lightning_fp.layers import LinearFormat
from lightning_fp.numerics.statistics import shares
from lightning_fp.plugins import LayerPrecision
from lightning_fp.plugins.guard import StepGuard
from lightning_fp.stability.judge.conviction import Conclusion
from lightning_fp.stability.questions import Survey, Surveyed
from lightning_fp.stability.watch import Watch
from lightning_fp.telemetry.casts.sampling import SampledSteps, StepSampler

Arm = Literal[
    "high precision",
    "unprotected",
    "skip-step",
    "rollback",
    "cast error",
    "fallback",
    "fallback, depth 1",
    "fallback, FP8 memory",
]
RIVALS: tuple[Arm, ...] = ("unprotected", "skip-step", "rollback", "cast error")
LESS_MEMORY: tuple[Arm, ...] = ("fallback, depth 1", "fallback, FP8 memory")
"""One snapshot in 200 steps; room for the activations of the run's formats and a tenth more, so
that replays in high precision compute those of blocks again."""

MOST_UNDERFLOW, MOST_ERROR = 0.05, 1e-4
"""Share of non-zero elements that a cast makes zero, and its mean squared error as a share of the
mean square, above which "cast error" takes the layer to high precision."""


def protection(arm: Arm, directory: Path) -> list[L.Callback]:
    """The callbacks of an arm; their records go to `directory`."""
    if arm == "skip-step":
        return [SkipStep()]
    if arm == "rollback":
        return [RollBack(dirpath=directory, limit=None, probe_every_n_steps=None)]
    if arm == "cast error":
        return [SwitchByCastError()]
    if arm == "fallback":
        return [PrecisionFallback(dirpath=directory)]
    if arm == "fallback, depth 1":
        return [PrecisionFallback(dirpath=directory, snapshots=1, snapshot_every_n_steps=200)]
    if arm == "fallback, FP8 memory":
        return [ActivationBound(of_first=1.1), PrecisionFallback(dirpath=directory)]
    return []


class SkipStep(L.Callback):
    """Leaves out steps that are not finite, and does nothing else."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        plugin = trainer.precision_plugin
        if isinstance(plugin, LayerPrecision):
            plugin.guard = StepGuard()


class GoesBack(Watch):
    """Has the run go back whenever a case is opened, without a verdict."""

    def _evidence(self, turn: Any, question: object, answer: object) -> None:
        if not isinstance(question, Survey) or not isinstance(answer, Surveyed):
            return
        step = question.at
        self._sentence.go_back(
            turn, step, answer, Conclusion(finding="unclear", start=answer.start)
        )
        calm = replace(self.fallback.acquitted(turn.state.fallback, step), acquittals=0)
        turn.state = replace(turn.state, inquiry=None, fallback=calm)


class RollBack(PrecisionFallback):
    """Goes back at every suspicion, lets the data move on, and never touches a format."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        watching = self.supervisor
        policy = watching.watch.fallback.policy
        watching.watch = GoesBack(watching.watch.detector, policy=policy)


class SwitchByCastError(L.Callback):
    """Takes a layer to high precision, for good, as soon as a cast of it loses too much."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._table = trainer.precision_plugin.precision_map
        steps = SampledSteps(1, 0)
        self._sampler = StepSampler(self._table.layers, 1, steps, listeners=[self._look])
        self._lost: list[str] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self._lost:
            high = trainer.precision_plugin.high_precision
            for name in self._lost:
                self._table.set(name, high, reason="its casts lose too much", author="fallback")
            self._lost = []
        self._sampler.before_batch(trainer.global_step)

    def on_after_backward(self, *_: Any) -> None:
        self._sampler.after_backward()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._sampler.after_batch(trainer.global_step)

    def _look(
        self, step: int, table: Tensor, names: list[str], formats: Sequence[LinearFormat]
    ) -> None:
        lost = shares(table[:, :3].cpu())
        error = 10 ** (-lost["sqnr_db"] / 10)
        over = (lost["underflow_fraction"] > MOST_UNDERFLOW) | (error > MOST_ERROR)
        low = torch.tensor([not format.is_high_precision for format in formats])
        self._lost = [names[row] for row in (over.any(dim=1) & low).nonzero().flatten().tolist()]

    def on_train_end(self, *_: Any) -> None:
        self._sampler.close()
