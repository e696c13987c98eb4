"""What PrecisionFallback costs while nothing is wrong: a 4-layer d=256 GPT on text, on the CPU.

The same steps, with the fallback at its defaults and without, in turns (`in_turns.py`). Each block
is the sum of 64 such steps, with all probes and snapshots that fall into it. Beside the ratios of
these blocks stands the time inside of the fallback's own entry points. Steps before `SKIP` are left
out, with the rehearsal among them, which is told apart, in steps; the first probes are not.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import lightning as L
import torch
from in_turns import Steps, blocks, in_turns
from side_by_side import cpu_seconds, report

from lightning_fp import FP8Precision, PrecisionFallback
from lightning_fp.demo.data import ByteBatches, read_sources
from lightning_fp.demo.model import ByteGPT
from lightning_fp.stability.replay.trajectory import replay_trajectory
from lightning_fp.stability.supervise.supervisor import Supervisor

SKIP, BLOCK, BLOCKS, PAIRS = 64, 64, 15, 4
EARLY = 384
"""By then the early probes are made; from here on a run is as it stays."""
BATCH, CONTEXT = 8, 64
T_95 = 2.001
"""Student's t of two sides at 95% with 59 degrees of freedom: of 60 blocks."""


class EntryPoints(PrecisionFallback):
    """Adds up the processor time inside of the fallback, entered from outside, after `SKIP`."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.steady, self.rehearsal = 0.0, 0.0, 0.0
        self._entered = False
        for name in ("_arrived", "on_train_batch_start", "on_after_backward", "on_train_batch_end"):
            setattr(self, name, self._timed(getattr(self, name)))

    def _timed(self, entry: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            if self._entered:
                return entry(*args)
            self._entered, began = True, time.process_time()
            try:
                return entry(*args)
            finally:
                self._entered, took = False, time.process_time() - began
                if self._trainer is not None and self._trainer.global_step >= SKIP:
                    self.inside += took
                    self.steady += took if self._trainer.global_step >= EARLY else 0.0
                elif self._trainer is not None and self._trainer.global_step < 16:
                    self.rehearsal += took

        return timed


def train(callbacks: list[L.Callback], steps: int) -> None:
    """The demo's model, larger; clipping by norm, as everybody trains a GPT."""
    torch.manual_seed(0)
    text, _ = read_sources()
    batches = ByteBatches(text, batches=steps, batch_size=BATCH, context=CONTEXT)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        plugins=FP8Precision("dynamic", base="32-true"),
        callbacks=callbacks,
        logger=False,
        gradient_clip_val=1.0,
        default_root_dir=tempfile.mkdtemp(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ByteGPT(context=CONTEXT), batches)


class Timed(NamedTuple):
    """What one process measured: seconds of its steps, and of the fallback where it has one."""

    steps: list[float]
    inside: float
    steady: float
    rehearsal: float


def one_arm(turns: Connection, *, with_fallback: bool, steps: int) -> Timed:
    """The training of one process."""
    timed, fallback = Steps(turns, SKIP), EntryPoints()
    train([fallback, timed] if with_fallback else [timed], steps)
    return Timed(timed.seconds, fallback.inside, fallback.steady, fallback.rehearsal)


class Replays(L.Callback):
    """Times what an incident needs, once, in units of a step."""

    def __init__(self, fallback: PrecisionFallback) -> None:
        self.fallback = fallback
        self.began: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: object, *_: object) -> None:
        if trainer.global_step == 100 and self.fallback.supervisor is not None:
            self.measure(self.fallback.supervisor)
        self.began.append(time.process_time())

    def measure(self, watching: Supervisor) -> None:
        pairs = zip(self.began[20:-1], self.began[21:], strict=True)
        a_step = statistics.median(after - before for before, after in pairs)
        loop, ring = watching.loop, watching.ring
        newest, older, *_ = watching.snapshots.kept
        steps, last = ring.since(older.step), ring.last
        before = loop.take()
        self.restore = cpu_seconds(lambda: loop.restore(newest), runs=5) / a_step
        loop.restore(before)
        replay = None if last is None else loop.replay(last)
        if replay is None or steps is None:
            raise RuntimeError("nothing was recorded")
        high = dict.fromkeys(loop.low(), loop.high)
        self.one = cpu_seconds(lambda: replay(high), runs=5) / a_step
        began = time.process_time()
        replay_trajectory(loop, older, steps, {})
        self.trajectory = (time.process_time() - began) / a_step / len(steps)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    number = int(sys.argv[1]) if len(sys.argv) > 1 else BLOCKS
    arms = [
        partial(one_arm, with_fallback=fallback, steps=SKIP + BLOCK * number + 1)
        for fallback in (False, True)
    ]
    pairs = in_turns(arms, PAIRS)
    ratios = [
        a / b
        for without, with_it in pairs
        for a, b in zip(blocks(with_it.steps, BLOCK), blocks(without.steps, BLOCK), strict=True)
    ]
    print("ratios of blocks:", [round(ratio, 4) for ratio in ratios])
    mean = statistics.mean(ratios)
    upper = mean + T_95 * statistics.stdev(ratios) / len(ratios) ** 0.5
    a_step = statistics.median(step for without, _ in pairs for step in without.steps)
    median = statistics.median(step for _, with_it in pairs for step in with_it.steps) / a_step
    inside = sum(with_it.inside for _, with_it in pairs)
    share = inside / sum(sum(without.steps) for without, _ in pairs)
    steady = sum(with_it.steady for _, with_it in pairs)
    steady /= sum(sum(without.steps[EARLY - SKIP :]) for without, _ in pairs)
    rehearsal = statistics.mean(with_it.rehearsal for _, with_it in pairs) / a_step
    replays = Replays(watch := PrecisionFallback())
    train([watch, replays], 110)
    report(
        [
            ("blocks of 64 steps with and without, mean ratio", mean, "<=", 1.03),
            ("the same, upper 95% bound", upper, "<=", 1.03),
            ("median step with and without", median, "<=", 1.03),
            ("time inside of the fallback, share of a step", share, "<=", 0.015),
            ("the same from step 384 on, early probes over", steady, "<=", 0.01),
            ("the rehearsal, in steps", rehearsal, "<=", 25.0),
            ("restoring a snapshot, in steps", replays.restore, "<=", 3.0),
            ("replaying one step in high precision, in steps", replays.one, "<=", 3.0),
            ("replaying a trajectory in the same formats, per step", replays.trajectory, "<=", 1.2),
        ]
    )


if __name__ == "__main__":
    main()
