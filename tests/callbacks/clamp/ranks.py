"""ClampMonitor on two real ranks with gloo: test_ranks.py."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fp import FP8Precision
from lightning_fp.callbacks import ClampMonitor
from lightning_fp.records import StatisticsWriter
from tests.helper import make_trainer
from tests.two_ranks import one_of_two_ranks


class Net(L.LightningModule):
    """Sums its loss, so that gradients of its operands do not depend on the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 16)
        self.steps = 0

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.steps += 1
        # Outliers that grow by steps: delayed scales cannot foresee them.
        x = batch[0] * (1 + self.global_step // 3)
        return self.second(torch.relu(self.first(x))).square().sum() * 1e-3

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)  # weights equal to the last bit


def train(directory: Path, world: int) -> tuple[Net, ClampMonitor]:
    generator = torch.Generator().manual_seed(0)
    rank = dist.get_rank() if world > 1 else 0
    data = TensorDataset(torch.randn(8 * 16, 32, generator=generator)[rank::world])
    monitor = ClampMonitor(every_n_steps=1, sample=1, log_every_n_steps=4)
    trainer = make_trainer(
        FP8Precision("delayed", layers={"second": "e4m3"}),
        max_steps=8,
        callbacks=[monitor],
        default_root_dir=directory,
        devices=world,
        strategy=DDPStrategy() if world > 1 else "auto",
        use_distributed_sampler=False,
    )
    model = Net()
    trainer.fit(model, DataLoader(data, batch_size=16 // world))
    return model, monitor


def main(directory: Path) -> None:
    with one_of_two_ranks(directory) as rank:
        train(directory / "two", 2)

        logging.getLogger("lightning_fp").setLevel(logging.CRITICAL)
        if rank == 0:  # the only rank that writes; the other one must stop with it

            def fail(*_: object) -> None:
                raise OSError("disk full")

            StatisticsWriter.append = fail
        model, monitor = train(directory / "failing", 2)
        torch.save(
            {"steps": model.steps, "failed": monitor._log.failed, "collects": model.first.collect},
            directory / f"rank{rank}.pt",
        )
