"""What ClampMonitor costs: a 4-layer d=256 GPT on the CPU, steps with and without it."""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings

import lightning as L
import torch
from side_by_side import medians, report
from torch import nn

from lightning_fp import FP8Precision
from lightning_fp.callbacks import ClampMonitor
from lightning_fp.demo.model import ByteGPT
from lightning_fp.layers import FPLinear, convert
from lightning_fp.layers.statistics_table import StatisticsTable

STEPS, BATCH, CONTEXT = 48, 8, 64


class Timed(L.Callback):
    """Seconds of the whole loop after the first steps, callbacks included."""

    def __init__(self, skip: int) -> None:
        self.skip, self.start, self.seconds = skip, 0.0, 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.skip:
            self.start = time.perf_counter()

    def on_train_end(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.start


class Trial:
    """One model and Trainer set-up, run again and again: `seconds()` of its later steps."""

    def __init__(self, monitor: dict[str, int] | None, compiled: bool) -> None:
        self.monitor, self.compiled = monitor, compiled

    def seconds(self) -> float:
        torch.manual_seed(0)
        model = ByteGPT(context=CONTEXT)
        if self.compiled:
            for block in model.blocks:
                block.compile()
        timed = Timed(skip=17)  # one window: every graph has been compiled
        callbacks: list[L.Callback] = [timed]
        directory = tempfile.mkdtemp()
        if self.monitor is not None:
            callbacks.insert(0, ClampMonitor(**self.monitor, dirpath=directory))
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=STEPS + 17,
            plugins=FP8Precision("delayed"),
            callbacks=callbacks,
            logger=False,
            log_every_n_steps=16,
            default_root_dir=directory,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        tokens = torch.randint(0, 256, ((STEPS + 17) * BATCH, CONTEXT + 1))
        trainer.fit(model, torch.utils.data.DataLoader(tokens, batch_size=BATCH))
        return timed.seconds


def step_ratio(monitor: dict[str, int], compiled: bool, rounds: int) -> float:
    """Median over interleaved rounds of (with monitor) / (without)."""
    pairs = []
    for _ in range(rounds):
        without = Trial(None, compiled).seconds()
        pairs.append(Trial(monitor, compiled).seconds() / without)
    return sorted(pairs)[len(pairs) // 2]


def log_interval_seconds(layers: int = 1_000) -> float:
    """Taking, reducing and copying the statistics of 1,000 layers x 4 operands to the host."""
    model = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(layers))
    convert(model, "fp8-dynamic")
    linears = {str(i): layer for i, layer in enumerate(model) if isinstance(layer, FPLinear)}
    table = StatisticsTable(linears)
    table.collect(True)
    for layer in model:
        layer(torch.randn(16, 16)).sum().backward()
    table.collect(False)
    return medians({"take": lambda: table.take().cpu()}, runs=20)["take"]


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    defaults, everything = {}, {"every_n_steps": 1, "sample": 1}
    report(
        [
            (
                "step with monitor at its defaults, eager",
                step_ratio(defaults, False, rounds),
                "<=",
                1.03,
            ),
            (
                "step with monitor at its defaults, compiled",
                step_ratio(defaults, True, rounds),
                "<=",
                1.01,
            ),
            (
                "step with every step, all rows, compiled",
                step_ratio(everything, True, rounds),
                "<=",
                1.10,
            ),
            (
                "milliseconds of a log interval, 1,000 layers",
                log_interval_seconds() * 1e3,
                "<=",
                50,
            ),
        ]
    )


if __name__ == "__main__":
    main()
