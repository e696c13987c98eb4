"""A Trainer step with FP8Precision and every layer in bf16, against Lightning's MixedPrecision."""

from __future__ import annotations

import logging
import statistics
import time
import warnings

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from side_by_side import report
from torch import nn

from lightning_fp import FP8Precision

STEPS = 60


class Blocks(L.LightningModule):
    """Residual MLP blocks, which remember how long each step took."""

    def __init__(self, *, width: int = 256, blocks: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 2 * width),
                nn.GELU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(blocks)
        )
        self.times: list[float] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        x = batch
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()

    def on_train_batch_start(self, *_: object) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.perf_counter() - self.start)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


def step_times(plugin: object) -> list[float]:
    L.seed_everything(0, verbose=False)
    model = Blocks()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        plugins=[plugin],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(STEPS * 64, 256), batch_size=64))
    return model.times[10:]


def main() -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(5):  # interleaved: whole runs in turn
        theirs += step_times(MixedPrecision("bf16-mixed", "cpu"))
        ours += step_times(FP8Precision("bf16"))
    ratio = statistics.median(ours) / statistics.median(theirs)
    report([("step with all layers bf16 / MixedPrecision", ratio, "<=", 1.02)])


if __name__ == "__main__":
    main()
