"""What ClampMonitor costs: a 4-layer d=256 GPT on the CPU, in blocks of 64 steps.

The same steps with and without the monitor, in turns (`in_turns.py`). A block has all that the
monitor does, its log intervals included. Steps before `SKIP` are left out: in them all is compiled.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import warnings
from functools import partial
from multiprocessing.connection import Connection

import lightning as L
import torch
from in_turns import Steps, blocks, in_turns
from side_by_side import report

from lightning_fp import FP8Precision
from lightning_fp.callbacks import ClampMonitor
from lightning_fp.demo.model import ByteGPT

SKIP, BLOCK, BLOCKS, PAIRS = 32, 64, 4, 4
INTERVAL, BATCH, CONTEXT = 16, 8, 64
T_95 = 2.131
"""Student's t of two sides at 95% with 15 degrees of freedom: of 16 blocks."""


def one_arm(
    turns: Connection, *, monitor: dict[str, int] | None, compiled: bool, steps: int
) -> list[float]:
    """Seconds of the steps of one training."""
    torch.manual_seed(0)
    model = ByteGPT(context=CONTEXT)
    if compiled:
        for region in (*model.blocks, model.head):
            region.compile()
    timed = Steps(turns, SKIP)
    options = {"dirpath": tempfile.mkdtemp(), "log_every_n_steps": INTERVAL}
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        plugins=FP8Precision("delayed"),
        callbacks=[timed] if monitor is None else [ClampMonitor(**monitor, **options), timed],
        logger=False,
        log_every_n_steps=INTERVAL,
        default_root_dir=tempfile.mkdtemp(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    tokens = torch.randint(0, 256, (steps * BATCH, CONTEXT + 1))
    trainer.fit(model, torch.utils.data.DataLoader(tokens, batch_size=BATCH))
    return timed.seconds


def ratios(monitor: dict[str, int], compiled: bool, number: int) -> list[float]:
    """Blocks with the monitor over blocks without."""
    steps = SKIP + BLOCK * number + 1
    arms = [partial(one_arm, monitor=m, compiled=compiled, steps=steps) for m in (None, monitor)]
    return [
        a / b
        for without, with_it in in_turns(arms, PAIRS)
        for a, b in zip(blocks(with_it, BLOCK), blocks(without, BLOCK), strict=True)
    ]


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    number = int(sys.argv[1]) if len(sys.argv) > 1 else BLOCKS
    claims = []
    for what, monitor, compiled, target in (
        ("at its defaults, eager", {}, False, 1.03),
        ("at its defaults, compiled", {}, True, 1.01),
        ("every step, all rows, compiled", {"every_n_steps": 1, "sample": 1}, True, 1.10),
    ):
        found = ratios(monitor, compiled, number)
        mean = statistics.mean(found)
        beside = T_95 * statistics.stdev(found) / len(found) ** 0.5
        print(f"{what}: {[round(ratio, 3) for ratio in sorted(found)]}", flush=True)
        claims.append((f"step with monitor {what}", mean, "<=", target))
        claims.append((f"the same, upper 95% bound, {what}", mean + beside, "<=", target))
    report(claims)


if __name__ == "__main__":
    main()
