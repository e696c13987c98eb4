"""What PrecisionFallback costs while nothing is wrong: a 4-layer d=256 GPT on the CPU."""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings

import lightning as L
import torch
from side_by_side import cpu_seconds, report

from lightning_fp import FP8Precision, PrecisionFallback
from lightning_fp.demo.model import ByteGPT
from lightning_fp.stability.replay.trajectory import replay_trajectory
from lightning_fp.stability.supervise.supervisor import Supervisor

SKIP, STEPS, BATCH, CONTEXT = 81, 128, 8, 64


class Timed(L.Callback):
    """Processor time of the whole loop, callbacks included, once all buffers are in use."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == SKIP:
            self.start = time.process_time()

    def on_train_end(self, *_: object) -> None:
        self.seconds = time.process_time() - self.start


def seconds(*callbacks: L.Callback) -> float:
    """One run's steps after the first ones."""
    torch.manual_seed(0)
    timed = Timed()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS + SKIP,
        plugins=FP8Precision("delayed", base="32-true"),
        callbacks=[*callbacks, timed],
        logger=False,
        gradient_clip_val=1.0,  # as everybody trains a GPT; its norm is the fallback's too
        default_root_dir=tempfile.mkdtemp(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    tokens = torch.randint(0, 256, ((STEPS + SKIP) * BATCH, CONTEXT + 1))
    trainer.fit(ByteGPT(context=CONTEXT), torch.utils.data.DataLoader(tokens, batch_size=BATCH))
    return timed.seconds


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
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    # The first hundreds of steps are probed more often than the long run: once in 1024 steps.
    # Their cost is 2 steps in 1024, or 1.002, which is added.
    ratios: list[float] = []
    for _ in range(rounds):
        without = seconds()
        ratios.append(seconds(PrecisionFallback(probe_every_n_steps=None)) / without + 2 / 1024)
    print([round(ratio, 4) for ratio in ratios])
    fallback = PrecisionFallback(probe_every_n_steps=None)
    replays = Replays(fallback)
    seconds(fallback, replays)
    report(
        [
            ("step with fallback at its defaults", statistics.median(ratios), "<=", 1.01),
            ("restoring a snapshot, in steps", replays.restore, "<=", 3.0),
            ("replaying one step in high precision, in steps", replays.one, "<=", 3.0),
            ("replaying a trajectory in the same formats, per step", replays.trajectory, "<=", 1.2),
        ]
    )


if __name__ == "__main__":
    main()
