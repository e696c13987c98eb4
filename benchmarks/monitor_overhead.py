"""What ClampMonitor costs: a 4-layer d=256 GPT on the CPU, in windows of 16 steps.

One run, in which the monitor works in every other window: what else changes on the machine in a few
seconds meets both kinds alike. A window has all that the monitor does, its log interval included.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings
from typing import Any

import lightning as L
import torch
from side_by_side import report

from lightning_fp import FP8Precision
from lightning_fp.callbacks import ClampMonitor
from lightning_fp.demo.model import ByteGPT

WINDOW, BATCH, CONTEXT = 16, 8, 64


class EveryOther(ClampMonitor):
    """Works in even windows alone, and keeps each window's processor time."""

    def __init__(self, **options: int) -> None:
        super().__init__(**options, dirpath=tempfile.mkdtemp(), log_every_n_steps=WINDOW)
        self.began: list[float] = []
        self.on = True

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step % WINDOW == 0:
            self.began.append(time.process_time())
            self.on = trainer.global_step // WINDOW % 2 == 0
        if self.on:
            super().on_train_batch_start(trainer, *args)

    def on_after_backward(self, *args: Any) -> None:
        if self.on:
            super().on_after_backward(*args)

    def on_train_batch_end(self, *args: Any) -> None:
        if self.on:
            super().on_train_batch_end(*args)

    def ratios(self) -> list[float]:
        """Each window with the monitor over the mean of its two neighbours without."""
        took = [end - start for start, end in zip(self.began, self.began[1:], strict=False)]
        even = range(2, len(took) - 1, 2)  # in the first two everything is compiled
        return [2 * took[i] / (took[i - 1] + took[i + 1]) for i in even if i > 2]


def ratios(monitor: dict[str, int], compiled: bool, windows: int) -> list[float]:
    """Steps with the monitor over steps without, sorted."""
    torch.manual_seed(0)
    model = ByteGPT(context=CONTEXT)
    if compiled:
        for region in (*model.blocks, model.head):
            region.compile()
    callback = EveryOther(**monitor)
    steps = WINDOW * (2 * windows + 4)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps + 1,
        plugins=FP8Precision("delayed"),
        callbacks=[callback],
        logger=False,
        log_every_n_steps=WINDOW,
        default_root_dir=tempfile.mkdtemp(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    tokens = torch.randint(0, 256, ((steps + 1) * BATCH, CONTEXT + 1))
    trainer.fit(model, torch.utils.data.DataLoader(tokens, batch_size=BATCH))
    return sorted(callback.ratios())


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    windows = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    claims = []
    for what, monitor, compiled, target in (
        ("at its defaults, eager", {}, False, 1.03),
        ("at its defaults, compiled", {}, True, 1.01),
        ("every step, all rows, compiled", {"every_n_steps": 1, "sample": 1}, True, 1.10),
    ):
        found = ratios(monitor, compiled, windows)
        low, high = found[len(found) // 4], found[-len(found) // 4]
        print(f"{what}: middle half {low:.3f} to {high:.3f} of {len(found)} windows", flush=True)
        claims.append((f"step with monitor {what}", statistics.median(found), "<=", target))
    report(claims)


if __name__ == "__main__":
    main()
