"""Sampled steps: which they are, and what they gather."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_fp.layers import LinearFormat
from lightning_fp.layers.statistics_table import ObservedLayer, StatisticsTable, over_ranks
from lightning_fp.numerics import combine
from lightning_fp.records import Sampled

Listener: TypeAlias = Callable[[int, Tensor, list[str], list[LinearFormat]], None]
"""Called with a sampled step: optimizer steps done at its end, float64 [layers, operands,
statistics] of this rank alone, the layers' names, and the formats they ran in."""


class SampledSteps:
    """One step in every window, at a place that only looks random.

    The place follows from the seed and the window's number: it is the same on all ranks and
    after a resume, and nothing periodic in the training can hide from it.

    Args:
        every_n_steps: length of a window.
        seed: of the places.
    """

    def __init__(self, every_n_steps: int, seed: int) -> None:
        self.every_n_steps = every_n_steps
        self.seed = seed
        self.last = -1
        """The step sampled last, of those at their windows' places."""
        self.asked = False
        """Whether the next step to begin is sampled wherever it stands."""
        self._step = -1

    def take(self, step: int) -> bool:
        """Whether to sample this step; a window whose place was jumped over is sampled late.

        Args:
            step: the step that the micro-batch at hand belongs to; a smaller one than last time
                begins anew.
        """
        begins, self._step = step != self._step, step
        asked = self.asked and begins  # asked for in mid-step, it is the step after
        self.asked &= not begins
        if self.last >= step:
            self.last = -1
        window, place = divmod(step, self.every_n_steps)
        chosen = _place(self.seed, window, self.every_n_steps)
        due = place >= chosen and (self.last < 0 or self.last // self.every_n_steps < window)
        if due:
            self.last = step
        return due or asked


@lru_cache(maxsize=16)
def _place(seed: int, window: int, length: int) -> int:
    """Of the sampled step in its window."""
    # A text seeds alike in every process: `random` takes its SHA-512, not its `hash`.
    return random.Random(f"{seed} {window}").randrange(length)


class StepSampler:
    """Gathers the statistics of sampled steps, apart for each pattern of formats they ran in.

    Args:
        layers: the layers to observe, by name.
        stride: SQNR and the error of the output look at every `stride`-th row.
        steps: which steps to sample.
        what_if: whether to compute what other scalings would have done.
        listeners: called at the end of every sampled step, before it is combined with others.
    """

    def __init__(
        self,
        layers: Mapping[str, ObservedLayer],
        stride: int,
        steps: SampledSteps,
        *,
        what_if: bool = False,
        listeners: list[Listener] | None = None,
    ) -> None:
        self.listeners: list[Listener] = [] if listeners is None else listeners
        """Who else reads the samples: one table alone can observe a layer."""
        self._table = StatisticsTable(layers, stride=stride, what_if=what_if)
        self._steps = steps
        self._formats: list[LinearFormat] = []
        self._collected = torch.zeros(0, dtype=torch.int64)
        self._began: int | None = None
        self._sampled: list[Sampled] = []

    def before_batch(self, step: int) -> None:
        """Begin to collect, if this is the first micro-batch of a sampled step.

        Args:
            step: optimizer steps so far.
        """
        if self._began is None and self._steps.take(step):
            self._began = step
            self._formats = self._table.formats()
            self._table.collect(True, turn=step // self._steps.every_n_steps)
            self._collected = torch.tensor(self._table.collecting(), dtype=torch.int64)

    def after_backward(self) -> None:
        """Take in what backward recorded, between the backwards of one step too."""
        # In a replay's backward no layer collects, and the formats are the replay's.
        if self._began is not None and any(self._table.collecting()):
            self._table.fold()
            self._formats = self._table.formats()  # they can change before the batch ends

    def after_batch(self, step: int) -> None:
        """End the sampled step, if the optimizer has stepped.

        Args:
            step: optimizer steps so far.
        """
        if self._began is None or step == self._began:
            return
        at, self._began = (self._began + 1,), None
        self._table.collect(False)
        values, steps = self._table.take(), self._collected
        # Before the sum over ranks, which comes once per interval: who acts on a sample, as the
        # layers' limits do, does not wait for that.
        for listener in self.listeners:
            listener(step, values, self._table.names, self._formats)
        # Sums over two formats would describe neither: each pattern has samples of its own.
        if self._sampled and self._sampled[-1].formats == self._formats:
            before = self._sampled.pop()
            values, steps = combine(before.values, values), before.steps + steps
            at = before.at + at
        self._sampled.append(Sampled(self._table.names, self._formats, values, steps, at))

    def over_ranks(self) -> list[Sampled]:
        """All steps sampled since the last time, over all ranks; a collective."""
        sampled, self._sampled = self._sampled, []
        return [replace(part, values=over_ranks(part.values)) for part in sampled]

    def close(self) -> None:
        """Leave the layers as they were."""
        self._table.close()
