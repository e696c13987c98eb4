"""A Trainer step under FSDP2 with FP8Precision, against torchao applied by hand: two gloo ranks.

    python benchmarks/fsdp2_overhead.py

Both multiply by torchao's rowwise function, emulated. Runs take turns, two short ones as a pair.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from side_by_side import report
from torch import nn
from torch.distributed.fsdp import fully_shard
from trainer_overhead import Blocks

from lightning_fp import FP8Precision

WIDTH, ROWS = 512, 256
STEPS, WARM_UP = 24, 6
PAIRS = int(os.environ.get("PAIRS", "20"))


class Sharded(Blocks):
    """Four blocks, sharded over the ranks."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__(width=WIDTH, blocks=4)
        self.by_hand = by_hand

    def configure_model(self) -> None:
        if self.by_hand:
            _apply_torchao(self.blocks)
        mesh = self.device_mesh["data_parallel"]
        for block in self.blocks:
            fully_shard(block, mesh=mesh)


def _apply_torchao(model: nn.Module) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name("rowwise")
    convert_to_float8_training(model, config=dataclasses.replace(config, emulate=True))


def step_seconds(by_hand: bool) -> float:
    """The median step of a short run."""
    L.seed_everything(0, verbose=False)
    model = Sharded(by_hand)
    plugin: Any = (
        MixedPrecision("bf16-mixed", "cpu") if by_hand else FP8Precision("fp8-rowwise", layers=ALL)
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_steps=STEPS,
        plugins=[plugin],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    rows = torch.randn(STEPS * ROWS, WIDTH)
    trainer.fit(model, torch.utils.data.DataLoader(rows, batch_size=ROWS))
    return statistics.median(model.times[WARM_UP:])


ALL = {"*": "fp8-rowwise"}


def rank(result: Path) -> None:
    """What each rank runs; the first writes the seconds of each pair."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning_fp").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    pairs: list[tuple[float, float]] = []
    for pair in range(PAIRS):
        order = (True, False) if pair % 2 else (False, True)
        seconds = {by_hand: step_seconds(by_hand) for by_hand in order}
        pairs.append((seconds[False], seconds[True]))
    if int(os.environ["RANK"]) == 0:
        result.write_text(json.dumps(pairs))


def interval(ratios: list[float]) -> tuple[float, float]:
    """95% of the medians of resampled pairs."""
    chance = random.Random(0)
    count = len(ratios)
    found = sorted(statistics.median(chance.choices(ratios, k=count)) for _ in range(4000))
    return found[100], found[-101]


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "pairs.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        subprocess.run(
            [sys.executable, *torchrun, __file__, str(result)],
            check=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        )
        ratios = [ours / theirs for ours, theirs in json.loads(result.read_text())]
    low, high = interval(ratios)
    print(
        f"{PAIRS} pairs of {STEPS} steps: {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}]"
    )
    report(
        [
            (
                "FSDP2 step with FP8Precision / torchao by hand",
                statistics.median(ratios),
                "<=",
                1.02,
            ),
            ("the same, upper end of 95%", high, "<=", 1.05),
        ]
    )


if __name__ == "__main__":
    rank(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
