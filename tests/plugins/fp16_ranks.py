"""FP16 on two real ranks with gloo, an overflow on one of them: test_fp16_ranks.py."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_fp import PrecisionFallback
from lightning_fp.plugins import FP16Precision, half_policy
from lightning_fp.stability.loss_scaling import LossScaling
from tests.callbacks.fallback.test_fp16_fallback import TooLarge
from tests.helper import LanguageModel, make_trainer, text_loader


class LargeOnOneRank(LanguageModel):
    """At step 2 rank 1's gradients overflow."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        return loss * 1e9 if self.global_rank == 1 and index == 2 else loss


class Sharded(LargeOnOneRank):
    def configure_model(self) -> None:
        if isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=half_policy())
        fully_shard(self.model, mesh=mesh, mp_policy=half_policy())


def run(model: LanguageModel, base: Any, strategy: Any) -> dict[str, Any]:
    plugin = FP16Precision(base, loss_scaling=LossScaling(init_scale=2.0**10, hysteresis=1))
    options = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}
    trainer = make_trainer(plugin, max_steps=4, **options)
    trainer.fit(model, text_loader(count=32, batch_size=2 if trainer.global_rank else 4))
    reduced = {p.grad.dtype for p in model.parameters() if p.grad is not None}
    weights = [
        p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.state_dict().values()
    ]
    return {
        **plugin.scaler.state.numbers(),  # pyright: ignore
        "named": dict(plugin.guard.overflowed),  # pyright: ignore
        "dtypes": reduced,
        "weights": float(sum(w.double().abs().sum() for w in weights)),
    }


class TooLargeOnOneRank(TooLarge):
    """From step 4 on rank 1's activations are beyond FP16."""

    def factor(self) -> float:
        return super().factor() if self.global_rank == 1 else 1.0


class Formats(L.Callback):
    """Notes the formats of each step."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        self.seen.append(set(trainer.precision_plugin.precision_map.formats().values()))


def fall_back(directory: Path) -> dict[str, Any]:
    model, formats = TooLargeOnOneRank(range(4, 99), forward=True), Formats()
    fallback = PrecisionFallback(probe_every_n_steps=None, dirpath=directory)
    trainer = make_trainer(
        FP16Precision(loss_scaling=LossScaling(init_scale=2.0**10)),
        max_steps=14,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        callbacks=[fallback, formats],
    )
    trainer.fit(model, text_loader())
    weights = sum(float(w.double().abs().sum()) for w in model.state_dict().values())
    return {"formats": formats.seen, "weights": weights, "phase": fallback.phase}


def main(directory: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory / 'meeting'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    results = {
        "ddp": run(LargeOnOneRank(), "16-mixed", DDPStrategy(process_group_backend="gloo")),
        "fsdp2": run(
            Sharded(), "16-true", ModelParallelStrategy(2, 1, process_group_backend="gloo")
        ),
    }
    results["fallback"] = fall_back(directory / "run")
    torch.save(results, directory / f"rank{rank}.pt")
    dist.destroy_process_group()
