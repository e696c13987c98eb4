"""StagedRollout on two real ranks with gloo: test_rollout_ranks.py."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_fp import ClampMonitor, FP8Precision
from lightning_fp.callbacks import StagedRollout
from lightning_fp.recipes import Gate, RolloutRecipe, Stage
from tests.callbacks.rollout.test_staged_rollout import Course, batches
from tests.helper import CONTEXT, LanguageModel, make_trainer
from tests.two_ranks import one_of_two_ranks

PER_STEP = 2 * 4 * (CONTEXT + 1)
"""Tokens of a step over both ranks."""

RECIPE = RolloutRecipe(
    name="ranks",
    stages=(
        Stage(
            name="logged",
            layers={"*": "high"},
            gates=(Gate(statistic="uneven", below=0.5, window=2),),
        ),
        Stage(name="tokens", layers={"*.fc1": "configured"}, until={"tokens": 10 * PER_STEP}),
        Stage(
            name="low",
            layers={"*": "configured"},
            gates=(Gate(statistic="sqnr_db/min", above=500.0, window=3),),
            on_fail="step_back",
            max_tries=1,
        ),
    ),
)


class Uneven(LanguageModel):
    """Logs a metric by itself on each rank: 1 and 0 from the sixth step on, 1 and 1 before."""

    def training_step(self, batch: Any, index: int) -> Any:
        self.log("uneven", 1.0 if self.global_rank == 0 or self.global_step < 5 else -0.1)
        return super().training_step(batch, index)


def main(directory: Path) -> None:
    logging.getLogger("lightning_fp").setLevel(logging.ERROR)
    with one_of_two_ranks(directory, seconds=120) as rank:
        seen, rollout = Course(), StagedRollout(RECIPE, dirpath=directory)
        trainer = make_trainer(
            FP8Precision("delayed", base="32-true"),
            max_epochs=1,
            log_every_n_steps=1,
            callbacks=[ClampMonitor(every_n_steps=1, dirpath=directory), rollout, seen],
            default_root_dir=directory,
            devices=2,
            strategy=DDPStrategy(),
            use_distributed_sampler=False,
        )
        trainer.fit(Uneven(), batches(20, seed=rank))
        told = {"formats": seen.formats, "ended": rollout.state.ended, "stage": rollout.stage}
        torch.save(told, directory / f"rank{rank}.pt")
