"""Runs on several real ranks, of which one is slow, dies, or cannot write: test_rank_faults.py."""

from __future__ import annotations

import logging
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_fp import ClampMonitor, FP8Precision, PrecisionFallback
from tests.callbacks.fallback.test_precision_fallback import Reversed, SuspectAt, batches
from tests.helper import LanguageModel, make_trainer
from tests.two_ranks import one_of_two_ranks

STEPS, ASKED = 64, 60
CHECKPOINT = "last.ckpt"


class Dies(L.Callback):
    """One rank is gone at once, as if the kernel had killed it."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 10:
            os._exit(9)


class Straggles(L.Callback):
    """One rank is late now and then, in the middle of a step."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_rank == 1 and trainer.global_step % 7 == 3:
            time.sleep(0.2)


class DiskFills(L.Callback):
    """From a step on the kernel refuses whatever one rank writes to a file."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 10:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for output in (1, 2):  # what is printed goes to a file here
                os.dup2(nowhere, output)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, self._limit[1]))

    def teardown(self, *_: Any, **__: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limit)


def run(
    directory: Path, *callbacks: L.Callback, steps: int = STEPS, resume: Path | None = None
) -> dict[str, Any]:
    """A run that is asked about a layer that is wrong in FP8, on all ranks alike."""
    fallback = PrecisionFallback(dirpath=directory, snapshot_every_n_steps=8)
    plugin, model = FP8Precision("delayed", base="32-true"), LanguageModel()
    world = int(os.environ["WORLD_SIZE"])
    trainer = make_trainer(
        plugin,
        max_epochs=-1,
        callbacks=[
            *callbacks,
            Reversed(),
            SuspectAt(fallback, ASKED, lasting=40),
            fallback,
            ClampMonitor(every_n_steps=8, dirpath=directory),
        ],
        default_root_dir=directory,
        devices=world,
        strategy=DDPStrategy() if world > 1 else "auto",
        use_distributed_sampler=False,
        max_steps=steps,
    )
    trainer.fit(model, batches(steps, seed=trainer.global_rank), ckpt_path=resume)
    if not callbacks:
        trainer.save_checkpoint(directory / CHECKPOINT)
    history = plugin.precision_map.scale_history
    return {
        "formats": plugin.precision_map.formats(),
        "changes": [(c.layer, c.before, c.after, c.reason) for c in plugin.precision_map.changes],
        "phase": fallback.phase,
        "failed_at": None if fallback.supervisor is None else fallback.supervisor.failed_at,
        "step": trainer.global_step,
        "history": {n: history._history[i].clone() for i, n in enumerate(history.names)},
        "weights": {name: w.detach().clone() for name, w in model.named_parameters()},
    }


def resumed(directory: Path) -> dict[str, Any]:
    """Eight steps more from a checkpoint that as many ranks as wanted have written."""
    return run(directory, steps=STEPS + 8, resume=directory.parent / CHECKPOINT)


RUNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sound": run,
    "straggler": lambda at: run(at, Straggles()),
    "dies": lambda at: run(at, Dies()),
    "disk 0": lambda at: run(at, DiskFills(0)),
    "disk 1": lambda at: run(at, DiskFills(1)),
    "resumed": resumed,
}


def main(directory: Path, names: list[str]) -> None:
    logging.getLogger("lightning_fp").setLevel(logging.ERROR)
    with one_of_two_ranks(directory) as rank:
        told = {name: RUNS[name](directory / name) for name in names}
        torch.save(told, directory / f"rank{rank}.pt")
