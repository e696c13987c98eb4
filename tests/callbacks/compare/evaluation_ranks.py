"""EvaluationGap and LossRecorder on two real ranks with gloo: test_evaluation_ranks.py."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader

from lightning_fp import FP8Precision
from lightning_fp.callbacks import EvaluationGap, LossRecorder
from tests.helper import LanguageModel, make_trainer, next_byte_loss, text_rows
from tests.two_ranks import one_of_two_ranks


class Evaluated(LanguageModel):
    """Trains without moving, so that its losses do not depend on the number of ranks."""

    silent_rank = -1

    def validation_step(self, batch: Tensor, index: int) -> Any:
        loss = next_byte_loss(self, batch)
        return None if self.global_rank == self.silent_rank else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Silent(Evaluated):
    silent_rank = 1


class Sharded(Evaluated):
    def configure_model(self) -> None:
        if not isinstance(self.model, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)


def loader(world: int, rank: int, first: int) -> DataLoader:
    """Four batches of four, which two ranks share; the whole is the same for any world."""
    batches = text_rows(64)[first : first + 16].view(4, 4, -1)
    return DataLoader(batches[rank::world].flatten(0, 1), batch_size=4)


def train(directory: Path, model: Evaluated, strategy: Any = None) -> EvaluationGap:
    world, rank = (1, 0) if strategy is None else (2, dist.get_rank())
    gap = EvaluationGap(dirpath=directory)
    trainer = make_trainer(
        FP8Precision("dynamic", base="32-true"),
        max_steps=2,
        val_check_interval=2,
        callbacks=[gap, LossRecorder()],
        devices=world,
        strategy=strategy or "auto",
        use_distributed_sampler=False,
        limit_train_batches=2,
    )
    trainer.fit(model, loader(world, rank, 16), loader(world, rank, 0))
    return gap


def main(directory: Path) -> None:
    with one_of_two_ranks(directory) as rank:
        sharding = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        found = {
            "ddp": train(directory / "ddp", Evaluated(), DDPStrategy()),
            "fsdp2": train(directory / "fsdp2", Sharded(), sharding),
        }
        logging.getLogger("lightning_fp").setLevel(logging.ERROR)
        found["silent"] = train(directory / "silent", Silent(), DDPStrategy())
        rows = {name: None if g.latest is None else vars(g.latest) for name, g in found.items()}
        torch.save(rows, directory / f"rank{rank}.pt")
