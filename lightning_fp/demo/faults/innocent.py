"""Faults that have nothing to do with precision: they harm a run in every format alike."""

from __future__ import annotations

import math

import lightning as L
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor, Tensor]
"""Inputs and targets, int64 [batch, time], and the weight of each sequence, float32 [batch]."""


class LearningRateJump(L.Callback):
    """The learning rate is a multiple of what it was when the fault began.

    Args:
        factor: the multiple.
        start: after how many steps it begins.
        steps: how long it lasts; None is to the end.
    """

    def __init__(self, *, factor: float = 30.0, start: int = 150, steps: int | None = None) -> None:
        self.factor, self.start, self.steps = factor, start, steps
        self._right: list[float] | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        end = math.inf if self.steps is None else self.start + self.steps
        if not self.start <= trainer.global_step <= end:
            return
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if self._right is None:
            self._right = [group["lr"] for group in groups]
        factor = 1.0 if trainer.global_step == end else self.factor
        for group, right in zip(groups, self._right, strict=True):
            group["lr"] = right * factor

    def state_dict(self) -> dict[str, list[float] | None]:
        return {"right": self._right}

    def load_state_dict(self, state_dict: dict[str, list[float] | None]) -> None:
        self._right = state_dict["right"]


class DataFault:
    """Something wrong with the batches that a loader gives.

    Args:
        start: after how many batches it begins.
        batches: how many it affects; None is all that follow.
        seed: of what is random.
    """

    def __init__(self, *, start: int = 150, batches: int | None = None, seed: int = 0) -> None:
        self.start, self.batches, self.seed = start, batches, seed

    def __call__(self, batch: Batch, number: int) -> Batch:
        """The batch as it should be -> as it is.

        Args:
            batch: inputs, targets, weights.
            number: counted from 1.
        """
        end = math.inf if self.batches is None else self.start + self.batches
        return self.spoil(batch, number) if self.start < number <= end else batch

    def spoil(self, batch: Batch, number: int) -> Batch:
        """An affected batch."""
        raise NotImplementedError


class NaNData(DataFault):
    """One sequence of the batch has a weight that is not a number."""

    def spoil(self, batch: Batch, number: int) -> Batch:
        inputs, targets, weights = batch
        index = torch.arange(len(weights))
        return inputs, targets, weights.masked_fill(index == number % len(weights), torch.nan)


class ShuffledLabels(DataFault):
    """The targets of a batch are in a random order."""

    def spoil(self, batch: Batch, number: int) -> Batch:
        inputs, targets, weights = batch
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(targets.numel(), generator=generator)
        return inputs, targets.flatten()[order].view_as(targets), weights
