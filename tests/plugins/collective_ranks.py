"""The collectives of each step of a watched run, on two real ranks: test_collectives.py."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override

from lightning_fp import ClampMonitor, FP8Precision, PrecisionFallback
from lightning_fp.loop import PrecisionLoop
from tests.helper import LanguageModel, make_trainer, next_byte_loss, text_loader
from tests.loop.strategy_ranks import BATCH, Collectives, batches, build
from tests.two_ranks import one_of_two_ranks

STEPS = 18
MONITOR = {"every_n_steps": 7, "log_every_n_steps": 10, "seed": 1}
SNAPSHOT_EVERY = 8
REHEARSED = 4
"""Steps until the watch has rehearsed."""

CLIP = 1.0


def in_a_loop(directory: Path, *, watched: bool) -> list[int]:
    """How many each step made."""
    model, wrapped = build("ddp", 3)
    loop = PrecisionLoop(
        wrapped,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        "fp8-delayed" if watched else "bf16",
        layers=None if watched else {"*": "high"},
        base="32-true",
        clip_norm=CLIP,
        monitor=MONITOR if watched else False,
        fallback={"snapshot_every_n_steps": SNAPSHOT_EVERY} if watched else False,
        log_every_n_steps=10,
        dirpath=directory if watched else None,
    )
    found: list[int] = []
    for batch in batches(STEPS):
        with Collectives() as counted:
            loop.step(lambda rows: next_byte_loss(wrapped, rows), batch)
        found.append(counted.counts.total())
    loop.close()
    return found


class Totals(L.Callback):
    """After each step, how many there were so far; a replay makes steps in between."""

    def __init__(self, counted: Collectives) -> None:
        self.counted = counted
        self.at: dict[int, int] = {}

    @override
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.at.setdefault(trainer.global_step, self.counted.counts.total())

    @override
    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.at[trainer.global_step] = self.counted.counts.total()


def in_a_trainer(directory: Path, *, watched: bool) -> list[int]:
    """How many there were from the beginning of each step to that of the next."""
    with Collectives() as counted:
        totals = Totals(counted)
        watches = [
            ClampMonitor(dirpath=directory, **MONITOR),
            PrecisionFallback(dirpath=directory, snapshot_every_n_steps=SNAPSHOT_EVERY),
        ]
        trainer = make_trainer(
            FP8Precision("delayed", base="32-true") if watched else None,
            max_steps=STEPS,
            devices=2,
            strategy=DDPStrategy(),
            callbacks=[totals, *(watches if watched else [])],
            gradient_clip_val=CLIP,
            log_every_n_steps=10,
            default_root_dir=directory,
            use_distributed_sampler=False,
        )
        trainer.fit(LanguageModel(), text_loader(BATCH * STEPS))
    at = totals.at
    return [at[step + 1] - at[step] for step in range(STEPS)]


def main(directory: Path) -> None:
    logging.getLogger("lightning_fp").setLevel(logging.ERROR)
    with one_of_two_ranks(directory, seconds=100) as rank:
        found = {
            run.__name__: [
                run(directory / f"{run.__name__} {on}", watched=on) for on in (False, True)
            ]
            for run in (in_a_loop, in_a_trainer)
        }
        torch.save(found, directory / f"rank{rank}.pt")
