"""What ClampMonitor costs: a 4-layer d=256 GPT on the CPU, steps with and without it."""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence

import lightning as L
import torch
from side_by_side import report

from lightning_fp import FP8Precision
from lightning_fp.callbacks import ClampMonitor
from lightning_fp.demo.model import ByteGPT

STEPS, BATCH, CONTEXT = 48, 8, 64


class Timed(L.Callback):
    """Processor time of the whole loop after the first steps, callbacks included."""

    def __init__(self, skip: int) -> None:
        self.skip, self.start, self.seconds = skip, 0.0, 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.skip:
            self.start = time.process_time()

    def on_train_end(self, *_: object) -> None:
        self.seconds = time.process_time() - self.start


class Trial:
    """One model and Trainer set-up, run again and again: `seconds()` of its later steps."""

    def __init__(self, monitor: dict[str, int] | None, compiled: bool) -> None:
        self.monitor, self.compiled = monitor, compiled

    def seconds(self) -> float:
        torch.manual_seed(0)
        model = ByteGPT(context=CONTEXT)
        if self.compiled:
            for region in (*model.blocks, model.head):
                region.compile()
        timed = Timed(skip=17)  # one window: every graph has been compiled
        callbacks: list[L.Callback] = [timed]
        directory = tempfile.mkdtemp()
        if self.monitor is not None:
            callbacks.insert(0, ClampMonitor(**self.monitor, dirpath=directory))
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=STEPS + 17,
            plugins=FP8Precision("delayed"),
            callbacks=callbacks,
            logger=False,
            log_every_n_steps=16,
            default_root_dir=directory,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        tokens = torch.randint(0, 256, ((STEPS + 17) * BATCH, CONTEXT + 1))
        trainer.fit(model, torch.utils.data.DataLoader(tokens, batch_size=BATCH))
        return timed.seconds


def step_ratios(monitors: Sequence[dict[str, int]], compiled: bool, rounds: int) -> list[float]:
    """Medians over interleaved rounds of (with each monitor) / (without)."""
    ratios: list[list[float]] = [[] for _ in monitors]
    for _ in range(rounds):
        without = Trial(None, compiled).seconds()
        for monitor, found in zip(monitors, ratios, strict=True):
            found.append(Trial(monitor, compiled).seconds() / without)
    print([[round(ratio, 3) for ratio in found] for found in ratios])
    return [statistics.median(found) for found in ratios]


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    defaults, everything = {}, {"every_n_steps": 1, "sample": 1}
    (eager,) = step_ratios([defaults], False, rounds)
    compiled, always = step_ratios([defaults, everything], True, rounds)
    report(
        [
            ("step with monitor at its defaults, eager", eager, "<=", 1.03),
            ("step with monitor at its defaults, compiled", compiled, "<=", 1.01),
            ("step with every step, all rows, compiled", always, "<=", 1.10),
        ]
    )


if __name__ == "__main__":
    main()
