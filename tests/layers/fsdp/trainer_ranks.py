"""Trainer runs on two real ranks with FSDP2: test_trainer.py."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lightning_fp import ClampMonitor, FP8Precision, PrecisionFallback
from lightning_fp.layers.switchable import Gathering
from tests.callbacks.fallback.fallback_ranks import ReversedOnOneRank
from tests.callbacks.fallback.test_precision_fallback import SuspectAt, batches
from tests.helper import CONTEXT, LanguageModel, make_trainer, text_loader
from tests.layers.fsdp.gather_ranks import Traffic
from tests.loop.faulty import told
from tests.two_ranks import one_of_two_ranks

WIDTH, BLOCKS, BATCH = 64, 3, 3
FLIP = 3
"""The step from which on a block is in bf16."""


@dataclass(frozen=True, kw_only=True)
class Run:
    scaling: str = "fp8-dynamic"
    incident: bool = False
    """Whether a layer of one rank is wrong in FP8, under the watch of the fallback."""


class Sharded(LanguageModel):
    """FSDP2 in bf16 over float32 shards; counts what is gathered in each step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.bytes: list[int] = []
        self.casts: list[int] = []

    def configure_model(self) -> None:
        if isinstance(self.model, FSDPModule):
            return
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.model, mesh=mesh, mp_policy=policy)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with Traffic(weights=WIDTH * WIDTH // 2, rows=BATCH * CONTEXT) as traffic:
            super().optimizer_step(*args, **kwargs)
        self.bytes.append(traffic.bytes)
        self.casts.append(traffic.casts)


class Flips(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == FLIP:
            trainer.precision_plugin.precision_map.set("*.blocks.1.*", "bf16")


def train(directory: Path, run: Run, all_gather: Gathering) -> dict[str, Any]:
    directory.mkdir(parents=True, exist_ok=True)
    plugin = FP8Precision(
        run.scaling, base="32-true", layers={"*": run.scaling}, all_gather=all_gather
    )
    if run.incident:
        model = Sharded()
        fallback = PrecisionFallback(dirpath=directory)
        callbacks = [
            ReversedOnOneRank(),
            SuspectAt(fallback, 60, lasting=40),
            fallback,
            ClampMonitor(dirpath=directory),
        ]
        loader: Any = batches(66, seed=torch.distributed.get_rank())
    else:
        model, callbacks = Sharded(blocks=BLOCKS, width=WIDTH), [Flips()]
        loader = text_loader(6 * BATCH, batch_size=BATCH)
    trainer = make_trainer(
        plugin,
        max_epochs=1,
        callbacks=callbacks,
        default_root_dir=directory,
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        use_distributed_sampler=False,
    )
    trainer.fit(model, loader, text_loader(2 * BATCH, batch_size=BATCH))
    weights: dict[str, Any] = model.state_dict()
    return {
        "losses": model.losses,
        "evaluated": model.val_losses,
        "formats": plugin.precision_map.formats(),
        "changes": [(c.layer, c.after, c.reason) for c in plugin.precision_map.changes],
        "told": told(directory) if run.incident and trainer.global_rank == 0 else [],
        "bytes": model.bytes,
        "casts": model.casts,
        "weights": {
            n: w.full_tensor() if hasattr(w, "full_tensor") else w for n, w in weights.items()
        },
    }


def main(directory: Path, runs: dict[str, Run]) -> None:
    logging.getLogger("lightning_fp").setLevel(logging.ERROR)
    with one_of_two_ranks(directory, seconds=120) as rank:
        found = {
            name: {
                kind: train(directory / f"{name} {kind}", run, kind) for kind in ("auto", "high")
            }
            for name, run in runs.items()
        }
        torch.save(found, directory / f"rank{rank}.pt")
