"""What ClampMonitor costs at its defaults: a 4-layer d=256 GPT on the CPU.

Added up from what one training shows, by processor time: how much longer sampled steps take than
those between them, one in 16; the time inside of the monitor's own hooks in the steps between; and
what a log interval adds, one in 50 steps. Ratios of whole steps with and without say less: they
scatter by more than the monitor costs.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch
from side_by_side import report

from lightning_fp import FP8Precision
from lightning_fp.callbacks import ClampMonitor
from lightning_fp.demo.model import ByteGPT

SKIP, STEPS = 40, 400
INTERVAL, BATCH, CONTEXT = 50, 8, 64


class Step(NamedTuple):
    """Seconds of one optimizer step: all of it, and those inside of the monitor."""

    whole: float
    hooks: float
    sampled: bool
    told: bool


class TimedMonitor(ClampMonitor):
    """Keeps the processor time of each step, and of its own hooks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(dirpath=tempfile.mkdtemp(), **options)
        self.steps: list[Step] = []
        self.listeners.append(self._is_sampled)
        self._began, self._hooks, self._sampled, self._told = 0.0, 0.0, False, False
        for name in ("on_train_batch_start", "on_after_backward", "on_train_batch_end"):
            setattr(self, name, self._timed(getattr(self, name)))

    def _is_sampled(self, *_: object) -> None:
        self._sampled = True

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(trainer: L.Trainer, *args: Any) -> None:
            began, latest = time.process_time(), self.latest
            if hook.__name__ == "on_train_batch_start":
                if self._began:
                    whole = began - self._began
                    self.steps.append(Step(whole, self._hooks, self._sampled, self._told))
                self._began, self._hooks, self._sampled, self._told = began, 0.0, False, False
            hook(trainer, *args)
            self._hooks += time.process_time() - began
            self._told |= self.latest is not latest

        return timed


def train(*, compiled: bool, **options: int) -> list[Step]:
    """The steps of one training."""
    torch.manual_seed(0)
    model = ByteGPT(context=CONTEXT)
    if compiled:
        for region in (*model.blocks, model.head):
            region.compile()
    monitor = TimedMonitor(**options)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        plugins=FP8Precision("delayed"),
        callbacks=[monitor],
        logger=False,
        log_every_n_steps=INTERVAL,
        default_root_dir=tempfile.mkdtemp(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    tokens = torch.randint(0, 256, (STEPS * BATCH, CONTEXT + 1))
    trainer.fit(model, torch.utils.data.DataLoader(tokens, batch_size=BATCH))
    return monitor.steps[SKIP:]


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    claims = []
    for mode in ("eager", "compiled"):
        steps = train(compiled=mode == "compiled")
        between = [step for step in steps if not step.sampled and not step.told]
        plain = statistics.median(step.whole for step in between)
        sampled = statistics.median(s.whole for s in steps if s.sampled and not s.told)
        hooks = statistics.median(step.hooks for step in between)
        told = statistics.median(s.hooks for s in steps if s.told and not s.sampled)
        every = len(steps) / sum(step.sampled for step in steps)
        cost = ((sampled - plain) / every + hooks + told / INTERVAL) / plain
        claims += [
            (f"all of the monitor, per step, {mode}", 1 + cost, "<=", 1.01),
            (f"a sampled step over one between, {mode}", sampled / plain, "<=", 1.16),
            (f"hooks of a step between, {mode}, share of it", hooks / plain, "<=", 0.002),
            (f"a log interval, {mode}, in steps", told / plain, "<=", 0.1),
        ]
    report(claims)


if __name__ == "__main__":
    main()
