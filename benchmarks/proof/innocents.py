"""Twelve things that spoil a run and are not precision's, on a net whose loss is mostly noise.

What is of one moment happens once, in the run, and not when its step is run again. So what
remembers it lies in a closure, where the watch cannot put it back.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.proof.nets import NoisyRegressor
from lightning_fp.demo.faults import LearningRateJump

START, STEPS = 100, 140


class Once(L.Callback):
    """Does something to the net before a step, the first time that this step is made."""

    def __init__(self, act: Callable[[Any], object]) -> None:
        self.first, self.act = first_time(), act

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        if trainer.global_step == START and self.first(START):
            with torch.no_grad():
                self.act(pl_module)


def first_time() -> Callable[[int], bool]:
    """Tells whether it is asked about a number for the first time."""
    seen: set[int] = set()

    def first(number: int) -> bool:
        new = number not in seen
        seen.add(number)
        return new

    return first


def flip_bit(net: NoisyRegressor) -> None:
    """The highest bit of an exponent: the weight is multiplied by 2^128."""
    net.net[4].weight.view(torch.int32)[0, 5] ^= 1 << 30


def initialise(net: NoisyRegressor) -> None:
    net.net[2].reset_parameters()
    net.net[2].weight.mul_(4)


def prune(net: NoisyRegressor) -> None:
    weight = net.net[0].weight
    weight.mul_(weight.abs() > weight.abs().median())
    net.net[2].weight[:, ::2] = 0.0


class BadLaunches(NoisyRegressor):
    """Eight products in a row are wrong, and right when they are made again."""

    def build(self) -> None:
        super().build()
        first = first_time()

        def spoil(module: Any, args: Any, output: Tensor) -> Tensor:
            step = self.global_step
            bad = self.training and START <= step < START + 8 and first(step)
            return output + 3.0 if bad else output

        self.net[4].register_forward_hook(spoil)


class CompiledCode(NoisyRegressor):
    """Compiled code gives wrong products in every format."""

    def build(self) -> None:
        super().build()
        self.register_buffer("wrong", torch.zeros(()))

        def spoil(module: Any, args: Any, output: Tensor) -> Tensor:
            roll = output.detach().roll(1, 0)
            return output + self.wrong * roll if torch.compiler.is_compiling() else output

        self.net[4].register_forward_hook(spoil)
        self.net.compile(backend="aot_eager")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.wrong.fill_(2.0 if self.global_step >= START else 0.0)


class OtherObjective(NoisyRegressor):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (3.0 if self.global_step >= START else 1.0) * super().training_step(batch, batch_idx)


class OneNoisyRank(NoisyRegressor):
    """The second of two ranks computes with noise of its own, another one each time."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.training and self.global_rank == 1 and self.global_step >= START:
            dice = torch.Generator().manual_seed(int.from_bytes(os.urandom(6), "little"))
            out = out + 2.0 * torch.randn(out.shape, generator=dice)
        return out


class Clock(NoisyRegressor):
    """What a step does depends on when it is made: on how many were made so far, ever."""

    def build(self) -> None:
        super().build()
        calls = [0]

        def late() -> bool:
            calls[0] += self.training
            return calls[0] > START + 40  # a while after the rehearsal's replays

        self.late = late

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + (1.0 if self.late() else 0.0)


class MemoryBank(NoisyRegressor):
    """What the last steps left in a list adds to the loss."""

    def build(self) -> None:
        super().build()
        self.bank = [0.0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.bank = [*self.bank, 0.1 if self.global_step >= START else 0.0][-16:]
        return loss + sum(self.bank)


class WarmRestarts(NoisyRegressor):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
            optimizer, START, eta_min=1e-3
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class OtherData(L.Callback):
    """From a batch on inputs are four times as large."""

    def spoil(self, batch: tuple[Tensor, Tensor], number: int) -> tuple[Tensor, Tensor]:
        return (4 * batch[0], batch[1]) if number >= START else batch


def learning_rate() -> L.Callback:
    return LearningRateJump(factor=100.0, start=START)
