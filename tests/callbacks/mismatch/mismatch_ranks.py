"""MismatchMonitor on two real ranks with gloo: test_mismatch_ranks.py."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fp import FP8Precision
from lightning_fp.callbacks.mismatch.mismatch_monitor import MismatchMonitor
from lightning_fp.stability import MismatchDetector
from tests.helper import make_trainer
from tests.two_ranks import one_of_two_ranks

STEPS = 44
START = 18
SILENT = 5
"""The step at which rank 1 has no tokens to push."""


class Policy(L.LightningModule):
    """Pushes what it made up; the second rank's engine drifts off, the first one's never does."""

    def __init__(self, monitor: MismatchMonitor, rank: int, *, broken_at: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16)
        self.__dict__["monitor"], self.rank, self.broken_at = monitor, rank, broken_at
        self.given: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        step = self.global_step
        if not (self.rank and step == SILENT):
            generator = torch.Generator().manual_seed(2 * step + self.rank)
            rollout = -torch.rand(2 + self.rank, 16, generator=generator) - 0.1
            size = 1e-3 * math.exp(self.rank * max(0, step - START) / 5)
            train = rollout - size * torch.rand(rollout.shape, generator=generator)
            self.given.append((rollout, train))
            broken = self.rank and step == self.broken_at
            self.monitor.update(rollout, train[:, 1:] if broken else train)
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def train(directory: Path, rank: int, steps: int, broken_at: int | None = None) -> dict:
    monitor = MismatchMonitor(
        act="raise-precision", detector=MismatchDetector(armed=16), dirpath=directory
    )
    trainer = make_trainer(
        FP8Precision(layers={"*": "fp8-dynamic"}),
        max_steps=steps,
        callbacks=[monitor],
        devices=2,
        strategy=DDPStrategy(),
        use_distributed_sampler=False,
    )
    model = Policy(monitor, rank, broken_at=broken_at)
    trainer.fit(model, DataLoader(torch.rand(4 * steps, 16), batch_size=4))
    table = trainer.precision_plugin.precision_map
    return {
        "given": model.given,
        "latest": monitor.latest,
        "formats": table.formats(),
        "state": monitor._log.warning.state_dict()["detector"],
        "steps": trainer.global_step,
    }


def main(directory: Path) -> None:
    with one_of_two_ranks(directory) as rank:
        found = {"growing": train(directory / "growing", rank, STEPS)}
        logging.getLogger("lightning_fp").setLevel(logging.CRITICAL)
        found["broken"] = train(directory / "broken", rank, 6, broken_at=3)
        torch.save(found, directory / f"rank{rank}.pt")
