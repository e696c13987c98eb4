"""A Trainer on two ranks that have layers of their own, for test_own_layers.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fp import ClampMonitor, FP8Precision, FP16Precision, LossScaling, PrecisionFallback
from lightning_fp.plugins import LayerPrecision
from tests.helper import make_trainer
from tests.loop.own_layers_ranks import WIDTH, Part, amaxes, blocks_of, rows
from tests.two_ranks import WORLD, one_of_two_ranks

STEPS = 3
BAD = 1
"""The step at which a gradient of one rank is not finite."""


class OwnLayers(L.LightningModule):
    """Some of the blocks, and the head that both ranks have; ranks exchange nothing."""

    def __init__(self, part: nn.Module, *, spoils: bool = False) -> None:
        super().__init__()
        self.part, self.spoils = part, spoils
        self.moved: list[bool] = []
        """By step, whether the head's weight is another than before."""

    def configure_model(self) -> None:
        """There is nothing to share."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        bad = self.spoils and index == BAD and dist.get_rank() == 1
        return self.part(batch).square().mean() * (torch.nan if bad else 1.0)

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = self._head()

    def on_train_batch_end(self, *_: Any) -> None:
        self.moved.append(not torch.equal(self._head(), self.before))

    def _head(self) -> Tensor:
        head: Any = self.part.head
        return head.weight.detach().clone()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def fit(model: L.LightningModule, plugin: LayerPrecision, *callbacks: L.Callback) -> str:
    """What an error at setup says; "" where there was none."""
    strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
    trainer = make_trainer(
        plugin,
        max_steps=STEPS,
        devices=WORLD,
        strategy=strategy,
        callbacks=list(callbacks),
        use_distributed_sampler=False,
    )
    batches: Any = [rows(dist.get_rank(), step) for step in range(STEPS)]
    try:
        trainer.fit(model, DataLoader(batches, batch_size=None))
    except ValueError as error:
        assert trainer.global_step == 0
        return str(error)
    return ""


def main(directory: Path) -> None:
    with one_of_two_ranks(directory) as rank:
        found: dict[str, Any] = {}
        torch.manual_seed(0)
        plugin, model = delayed(), OwnLayers(Part(blocks_of(rank)))
        found["said"] = fit(model, plugin)
        found["amax"] = amaxes(plugin.precision_map)
        watches = ClampMonitor(dirpath=directory), PrecisionFallback(dirpath=directory)
        found["watched"] = fit(OwnLayers(Part(blocks_of(rank))), delayed(), *watches)
        found["sizes"] = fit(
            OwnLayers(nn.Sequential(nn.Linear(WIDTH, WIDTH * (1 + rank)))), delayed()
        )
        spoilt = OwnLayers(Part(blocks_of(rank)), spoils=True)
        fit(spoilt, FP16Precision(loss_scaling=LossScaling.static(128)))
        found["moved"] = spoilt.moved
        torch.save(found, directory / f"rank{rank}.pt")


def delayed() -> FP8Precision:
    return FP8Precision("delayed", base="32-true", layers={"*": "fp8-delayed"})
