"""What PrecisionFallback costs while nothing is wrong: a 4-layer d=256 GPT on the CPU."""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings

import lightning as L
import torch
from side_by_side import report

from lightning_fp import FP8Precision, PrecisionFallback
from lightning_fp.demo.model import ByteGPT

SKIP, STEPS, BATCH, CONTEXT = 17, 128, 8, 64


class Timed(L.Callback):
    """Processor time of the whole loop after the first steps, callbacks included."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == SKIP:
            self.start = time.process_time()

    def on_train_end(self, *_: object) -> None:
        self.seconds = time.process_time() - self.start


def seconds(*callbacks: L.Callback) -> float:
    """One run's steps after the first ones."""
    torch.manual_seed(0)
    timed = Timed()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS + SKIP,
        plugins=FP8Precision("delayed", base="32-true"),
        callbacks=[*callbacks, timed],
        logger=False,
        default_root_dir=tempfile.mkdtemp(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    tokens = torch.randint(0, 256, ((STEPS + SKIP) * BATCH, CONTEXT + 1))
    trainer.fit(ByteGPT(context=CONTEXT), torch.utils.data.DataLoader(tokens, batch_size=BATCH))
    return timed.seconds


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    # The first hundreds of steps are probed more often than the long run: once in 1024 steps.
    # Their cost is 2 steps in 1024, or 1.002, which is added.
    ratios: list[float] = []
    for _ in range(rounds):
        without = seconds()
        ratios.append(seconds(PrecisionFallback(probe_every_n_steps=None)) / without + 2 / 1024)
    print([round(ratio, 4) for ratio in ratios])
    report([("step with fallback at its defaults", statistics.median(ratios), "<=", 1.01)])


if __name__ == "__main__":
    main()
