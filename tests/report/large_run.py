"""Made-up records of a run, of any size, without training anything."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from lightning_fp.records import (
    Demotion,
    EventWriter,
    LossRow,
    LossWriter,
    Promotion,
    SkippedStep,
    Started,
    StatisticsWriter,
    Suspicion,
)
from lightning_fp.records.run import LayerInfo, RunInfo, write_run

EVERY = 16
"""Steps of a log interval."""

OPERANDS = ("input", "weight", "grad_output")


def write_large_run(run_dir: Path, *, layers: int, intervals: int, seed: int = 0) -> Path:
    """Statistics, losses, events and options, as a long run leaves them.

    One layer clamps more and more from the middle on, until it is demoted; no two values are equal.
    """
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.blocks.{i // 4}.{('qkv', 'out', 'up', 'down')[i % 4]}" for i in range(layers)]
    steps, middle = intervals * EVERY, intervals // 2 * EVERY
    culprit, back = names[layers // 2], middle + max(4, intervals // 8) * EVERY
    write_run(
        run_dir,
        RunInfo(
            step=0,
            settings={"FP8Precision": {"scaling": "fp8-delayed"}},
            layers=tuple(
                LayerInfo(name=name, format="fp8-delayed", kernel="native", flops_share=1 / layers)
                for name in names
            ),
        ),
    )

    writer = StatisticsWriter(run_dir, rows_per_part=2**17, seconds=math.inf)
    count = layers * len(OPERANDS)
    columns = {
        "layer": [name for name in names for _ in OPERANDS],
        "operand": list(OPERANDS) * layers,
        "format": ["fp8-delayed"] * count,
    }
    at = names.index(culprit) * len(OPERANDS)
    for interval in range(1, intervals + 1):
        values = torch.rand(4, count, generator=generator)
        clamped = values[0] * 1e-4
        if 0 <= interval * EVERY - middle <= 2 * EVERY:
            clamped[at] = 0.1 + 0.01 * (interval * EVERY - middle) / EVERY
        writer.append(
            {
                "step": [interval * EVERY] * count,
                **columns,
                "nonfinite": [0] * count,
                "clamped_mass": clamped.numpy(),
                "underflow_fraction": (values[1] * 0.05).numpy(),
                "sqnr_db": (25 + values[2] * 6).numpy(),
                "what_if_dynamic_underflow_fraction": (values[3] * 0.05).numpy(),
            }
        )
    writer.flush()

    noise = torch.randn(steps, generator=generator).tolist()
    LossWriter(run_dir).append(
        LossRow(
            step=step,
            loss=2 + 3 * math.exp(-4 * step / steps) + 0.05 * noise[step - 1],
            grad_norm=1 + 0.1 * abs(noise[step - 1]),
            seconds=0.1,
        )
        for step in range(1, steps + 1)
    )

    events = EventWriter(run_dir)
    events.append(Started(step=0, reason="watching", numbers={"all_snapshots_bytes": 2.0**20}))
    for step in range(middle + 2, middle + 6):
        events.append(SkippedStep(step=step, reason="a gradient was inf or NaN"))
    events.append(Suspicion(step=middle + 6, reason="the loss has jumped"))
    demoted = {culprit: ("fp8-delayed", "fp8-dynamic")}
    events.append(Demotion(step=middle + 6, reason="to blame", formats=demoted))
    given = {culprit: ("fp8-dynamic", "fp8-delayed")}
    events.append(Promotion(step=back, reason="on probation long enough", formats=given))
    return run_dir
