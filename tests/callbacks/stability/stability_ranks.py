"""StabilityMonitor on two real ranks with gloo: test_stability_ranks.py."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fp import FP8Precision, StabilityMonitor
from lightning_fp.callbacks.run.run import run_of
from lightning_fp.telemetry.stability.signals import PUBLISHED
from tests.helper import LanguageModel, make_trainer, text_rows
from tests.two_ranks import one_of_two_ranks

STEPS = 6
ROWS = 4
"""Of a micro-batch, of which each step has two: one on each rank, or both on the only one."""

NO_CROSS_ENTROPY, LARGE = 254, 255
"""First bytes of a micro-batch that has no sharpness, and of one with outliers."""


class Model(LanguageModel):
    def __init__(self) -> None:
        super().__init__()
        self.gain = 1.0
        self.model.embed.register_forward_hook(lambda _, args, output: output * self.gain)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        first = int(batch[0, 0])
        if first == NO_CROSS_ENTROPY:
            return self(batch[:, :-1]).float().square().mean()
        self.gain = 20.0 if first == LARGE else 1.0
        return super().training_step(batch, index)


def micro_batches() -> Tensor:
    """[steps, 2, rows, bytes]; the second of a step is the odd one."""
    rows = text_rows(2 * STEPS * ROWS).view(STEPS, 2, ROWS, -1).clone()
    rows[2, 1, 0, 0] = NO_CROSS_ENTROPY
    rows[4, 1, 0, 0] = LARGE
    return rows


def train(directory: Path, world: int) -> list[float]:
    """Train, and give what is on the board at the end."""
    batches = micro_batches()
    if world > 1:
        batches = batches[:, dist.get_rank()]
    module = Model()
    trainer = make_trainer(
        FP8Precision(base="32-true"),
        max_steps=STEPS,
        callbacks=[StabilityMonitor(dirpath=directory)],
        default_root_dir=directory,
        log_every_n_steps=4,
        devices=world,
        strategy=DDPStrategy() if world > 1 else "auto",
        accumulate_grad_batches=2 // world,
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader(batches.flatten(0, -2), batch_size=ROWS))
    board = run_of(trainer).board
    shown = [board.latest(name) for name in PUBLISHED]
    return [math.nan if each is None else each.value for each in shown]


def main(directory: Path) -> None:
    with one_of_two_ranks(directory) as rank:
        torch.save(train(directory / "two", 2), directory / f"board{rank}.pt")
