"""Whole runs under tensor parallelism on two real ranks: test_tensor_parallel.py."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_fp import ClampMonitor, FP8Precision, PrecisionFallback
from tests.helper import LanguageModel, make_trainer, text_loader
from tests.two_ranks import one_of_two_ranks

HALF = 12
"""Steps of an epoch, of which there are two."""


CHECKPOINT = "half.ckpt"


class TensorParallel(LanguageModel):
    """Each rank has half of every MLP; with `sharded` FSDP2 shards it too, over one rank."""

    def __init__(self, *, sharded: bool = False) -> None:
        super().__init__()
        self.sharded = sharded

    def configure_model(self) -> None:
        if isinstance(self.model.blocks[0].fc1.weight, DTensor):
            return
        mesh = self.device_mesh
        for block in self.model.blocks:
            plan = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
            parallelize_module(block, mesh["tensor_parallel"], plan)
            if self.sharded:
                fully_shard(block, mesh=mesh["data_parallel"])
        if self.sharded:
            fully_shard(self.model, mesh=mesh["data_parallel"])


def tensor_parallel() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)


class Flips(L.Callback):
    """One layer's format changes in the run."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == HALF // 2:
            trainer.precision_plugin.precision_map.set("model.blocks.1.fc1", "fp8-rowwise")


class Saves(L.Callback):
    """A checkpoint after the first epoch."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / CHECKPOINT

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def train(
    directory: Path,
    scaling: str,
    *,
    parallel: bool = True,
    sharded: bool = False,
    resume: Path | None = None,
) -> dict[str, Any]:
    """A run of two epochs, on both ranks or on one process."""
    clamps = ClampMonitor(every_n_steps=4, dirpath=directory)
    fallback = PrecisionFallback(dirpath=directory, snapshot_every_n_steps=4)
    plugin = FP8Precision(scaling, base="32-true")
    model = TensorParallel(sharded=sharded) if parallel else LanguageModel()
    trainer = make_trainer(
        plugin,
        max_epochs=2,
        callbacks=[clamps, fallback, Flips(), *([] if resume else [Saves(directory)])],
        devices=2 if parallel else 1,
        strategy=tensor_parallel() if parallel else "auto",
        gradient_clip_val=0.5,
        default_root_dir=directory,
        limit_val_batches=2,
        use_distributed_sampler=False,
    )
    trainer.fit(model, text_loader(4 * HALF), text_loader(16), ckpt_path=resume)
    history = plugin.precision_map.scale_history
    return {
        "losses": model.losses,
        "val_losses": model.val_losses,
        "formats": plugin.precision_map.formats(),
        "scales": history._scales.clone() if len(history) else torch.zeros(0),
        "weights": {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in model.named_parameters()
        },
        "failed_at": None if fallback.supervisor is None else fallback.supervisor.failed_at,
        "phase": fallback.phase,
    }


def main(directory: Path, runs: list[str]) -> None:
    logging.getLogger("lightning_fp").setLevel(logging.ERROR)
    with one_of_two_ranks(directory, seconds=120) as rank:
        told: dict[str, Any] = {}
        for name in runs:
            scaling, _, sharded = name.partition(" ")
            at, again = directory / name, directory / f"{name} resumed"
            told[at.name] = train(at, scaling, sharded=bool(sharded))
            told[again.name] = train(again, scaling, sharded=bool(sharded), resume=at / CHECKPOINT)
        torch.save(told, directory / f"rank{rank}.pt")
