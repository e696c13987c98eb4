"""How far a run is: its losses and tokens, as stages and gates ask for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_fp.callbacks.rollout.rollout_sources import LOSS, LOSS_GAP, Points
from lightning_fp.records import read_loss
from lightning_fp.stability.detect.signals import SignalQueue


class LossSource:
    """The loss of every step, and its gap to a recorded run's at the same step.

    Args:
        baseline: directory of the recorded run; None: there is none.
    """

    def __init__(self, baseline: str | Path | None) -> None:
        self._queue = SignalQueue()
        self._losses: list[Tensor] = []
        self._recorded: dict[int, float] = {}
        if baseline is not None:
            recorded = read_loss(baseline)
            pairs = zip(recorded.steps.tolist(), recorded.values.tolist(), strict=True)
            self._recorded = dict(pairs)

    def add(self, outputs: Any) -> None:
        """Take in a micro-batch's output."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach().reshape(()).float())

    def end_step(self, step: int, *, automatic: bool, device: torch.device) -> None:
        """A step is over; one collective if distributed.

        Args:
            step: optimizer steps done.
            automatic: whether Lightning has divided the losses by the number of micro-batches.
            device: where collectives run.
        """
        losses, self._losses = self._losses, []
        reduce = torch.sum if automatic else torch.mean
        self._queue.put(
            step,
            loss=reduce(torch.stack(losses)) if losses else None,
            grad_norms=[],
            skipped=[],
            headroom=None,
            lr=None,
            device=device,
        )

    def take(self, *, all: bool = False) -> Points:
        """The steps whose losses have arrived; all, and wait for them, if asked to."""
        points: Points = {LOSS: [], LOSS_GAP: []}
        for seen in self._queue.take(all=all):
            if seen.loss is not None:
                points[LOSS].append((seen.step, seen.loss))
                points[LOSS_GAP].append((seen.step, self._gap(seen.step, seen.loss)))
        return points

    def _gap(self, step: int, loss: float) -> float:
        """(loss - recorded) / |recorded|; NaN where nothing was recorded."""
        recorded = self._recorded.get(step, math.nan)
        return (loss - recorded) / abs(recorded) if recorded else math.nan


class TokenCounter:
    """Training tokens over all ranks.

    Without a number given, those of a micro-batch are the elements of the first tensor of integers
    in it. Several ranks add up what they have counted once per `interval`, one is exact at once.

    Args:
        per_step: tokens of one optimizer step over all ranks, if they are always as many.
        interval: steps from one sum over ranks to the next.
    """

    def __init__(self, per_step: int | None, interval: int) -> None:
        self._per_step, self._interval = per_step, interval
        self._here = 0
        self.total = 0
        """Tokens so far."""

    def add(self, batch: Any) -> None:
        """Take in a micro-batch.

        Raises:
            ValueError: if it has no tensor of integers.
        """
        if self._per_step is not None:
            return
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor) and _is_integer(leaf.dtype):
                self._here += leaf.numel()
                return
        raise ValueError(
            "until.tokens cannot be counted: a batch has no tensor of integers; give"
            " StagedRollout(..., tokens_per_step=...) or another until"
        )

    def end_step(self, step: int, trainer: L.Trainer) -> None:
        """A step is over; now and then a collective."""
        if self._per_step is not None:
            self.total += self._per_step
        elif trainer.world_size == 1:
            self.total += self._here
            self._here = 0
        elif step % self._interval == 0:
            here = torch.tensor(self._here, device=trainer.strategy.root_device)
            self.total += int(trainer.strategy.reduce(here, reduce_op="sum"))
            self._here = 0

    def state_dict(self) -> dict[str, int]:
        """Plain numbers; what is not summed over ranks yet is the saving rank's."""
        return {"total": self.total, "here": self._here}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """See `state_dict`."""
        self.total, self._here = state["total"], state["here"]


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
