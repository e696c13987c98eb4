"""PrecisionFallback on two real ranks with gloo, the fault on one: test_fallback_ranks.py."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_fp import FP8Precision, PrecisionFallback
from tests.callbacks.fallback.test_precision_fallback import LAYER, Reversed, SuspectAt, batches
from tests.helper import LanguageModel, make_trainer
from tests.plugins.tensor_parallel_ranks import TensorParallel, tensor_parallel
from tests.two_ranks import one_of_two_ranks


class ReversedOnOneRank(Reversed):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_rank == 1:
            super().on_train_start(trainer, pl_module)

    def on_train_end(self, *_: Any) -> None:
        pass


class StuckOnOneRank(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        history = trainer.precision_plugin.precision_map.scale_history
        if trainer.global_rank == 1 and trainer.global_step >= 70 and LAYER in history.names:
            index = history.names.index(LAYER)
            amax = history._history[index, 2].amax()
            history._scales[index, 2] = 256 * history._limits[index, 2] / amax


class PoisonedOnOneRank(LanguageModel):
    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        return loss * float("nan") if self.global_rank == 1 and index == 30 else loss


class Sharded(LanguageModel):
    """FSDP2, each block by itself."""

    def configure_model(self) -> None:
        if isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def run(
    directory: Path,
    scaling: str,
    steps: int,
    fault: L.Callback | None,
    model: LanguageModel,
    strategy: Any = None,
) -> dict[str, Any]:
    fallback = PrecisionFallback(dirpath=directory)
    suspect = [SuspectAt(fallback, 60, lasting=40)] if isinstance(fault, Reversed) else []
    trainer = make_trainer(
        FP8Precision(scaling, base="32-true"),
        max_epochs=1,
        callbacks=[*([] if fault is None else [fault]), *suspect, fallback],
        default_root_dir=directory,
        devices=2,
        strategy=DDPStrategy() if strategy is None else strategy,
        use_distributed_sampler=False,
    )
    same_data = isinstance(model, TensorParallel)
    trainer.fit(model, batches(steps, seed=0 if same_data else trainer.global_rank))
    table = trainer.precision_plugin.precision_map
    weights: Any = model.state_dict().items()
    return {
        "formats": table.formats(),
        "changes": [(c.layer, c.before, c.after, c.reason) for c in table.changes],
        "steps": fallback.steps.sentence(),
        "phase": fallback.phase,
        "weights": {n: w.full_tensor() if hasattr(w, "full_tensor") else w for n, w in weights},
        "optimizer_steps": [
            float(state["step"]) for state in trainer.optimizers[0].state_dict()["state"].values()
        ],
    }


RUNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "incident": lambda at: run(at, "dynamic", 64, ReversedOnOneRank(), LanguageModel()),
    "limit": lambda at: run(at, "delayed", 80, StuckOnOneRank(), LanguageModel()),
    "sharded": lambda at: run(
        at,
        "dynamic",
        64,
        ReversedOnOneRank(),
        Sharded(),
        ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    ),
    "tensor parallel": lambda at: run(
        at, "dynamic", 64, ReversedOnOneRank(), TensorParallel(), tensor_parallel()
    ),
    "two dimensions": lambda at: run(
        at, "delayed", 64, ReversedOnOneRank(), TensorParallel(sharded=True), tensor_parallel()
    ),
    "skip": lambda at: run(at, "dynamic", 34, None, PoisonedOnOneRank()),
}


def main(directory: Path, names: list[str]) -> None:
    logging.getLogger("lightning_fp").setLevel(logging.ERROR)
    with one_of_two_ranks(directory, seconds=120) as rank:
        told = {name: RUNS[name](directory / name) for name in names}
        torch.save(told, directory / f"rank{rank}.pt")
