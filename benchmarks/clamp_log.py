"""What the clamp log costs: a log interval of 1,000 layers, disk per row, queries of a long run."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from side_by_side import cpu_seconds, report
from torch import nn

from lightning_fp.layers import FPLinear, convert
from lightning_fp.records import StatisticsWriter, read_statistics, statistics_rows
from lightning_fp.records.tables import SCHEMA
from lightning_fp.telemetry.casts.sampling import SampledSteps, StepSampler
from lightning_fp.telemetry.casts.summary import summary

INTERVALS, LAYERS, OPERANDS = 100_000, 4, ("input", "weight", "output", "grad_output")
MEASURED = [name for name in SCHEMA.names[4:] if not name.startswith("what_if")]


def interval_seconds(layers: int = 1_000) -> float:
    """Everything ClampMonitor does at the end of an interval but the loggers' own work."""
    model = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(layers))
    history = convert(model, "fp8-delayed").precision_map.scale_history
    linears = {str(i): layer for i, layer in enumerate(model) if isinstance(layer, FPLinear)}
    sampler = StepSampler(linears, 8, SampledSteps(1, 0))
    sampler.before_batch(0)
    for layer in model:
        layer(torch.randn(16, 16)).sum().backward()
    history.step()
    sampler.after_batch(1)
    kept = sampler._sampled
    with tempfile.TemporaryDirectory() as directory:
        writer = StatisticsWriter(Path(directory), rows_per_part=1)

        def interval() -> None:
            sampler._sampled = list(kept)
            rows = statistics_rows(sampler.over_ranks(), history.take_amax_record())
            summary(rows)
            writer.append(rows.columns(16))

        return cpu_seconds(interval, runs=20)


def intervals() -> Iterator[dict[str, Any]]:
    """Rows of a run, as noisy as a real one's: the low bits of no two values are equal."""
    generator = np.random.default_rng(0)
    layers = [f"model.blocks.{i}.mlp.down" for i in range(LAYERS) for _ in OPERANDS]
    for step in range(16, 16 * INTERVALS + 1, 16):
        columns: dict[str, Any] = {name: generator.lognormal(size=len(layers)) for name in MEASURED}
        columns["sampled_steps"] = np.ones(len(layers))
        columns["numel"] = np.full(len(layers), 2.0**20)
        columns["nonfinite"] = np.zeros(len(layers))
        columns["nonzero"] = np.floor(columns["nonzero"] * 1e5)
        columns["clamped_fraction"] = np.where(generator.random(len(layers)) < 0.9, 0.0, 1e-4)
        columns["clamp_sqnr_db"] = np.full(len(layers), math.inf)
        yield {
            "step": [step] * len(layers),
            "layer": layers,
            "operand": list(OPERANDS) * LAYERS,
            "format": ["fp8-delayed"] * len(layers),
            **columns,
        }


def main() -> None:
    milliseconds = interval_seconds() * 1e3
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory)
        writer = StatisticsWriter(run_dir, seconds=math.inf)
        began = time.process_time()
        for rows in intervals():
            writer.append(rows)
        writer.flush()
        writing = (time.process_time() - began) / INTERVALS
        files = list((run_dir / "statistics").iterdir())
        size = sum(file.stat().st_size for file in files)
        rows = read_statistics(run_dir, columns=["step"]).num_rows
        print(f"\n{rows:,} rows in {len(files)} parts, {size / 2**20:.0f} MiB")
        layer = pc.field("layer") == "model.blocks.2.mlp.down"
        course = layer & (pc.field("operand") == "input")

        def query() -> None:
            table = read_statistics(run_dir, columns=["step", "clamped_mass"], filters=course)
            assert table.num_rows == INTERVALS

        seconds = cpu_seconds(query, runs=5)
    report(
        [
            ("milliseconds of a log interval, 1,000 layers x 4 operands", milliseconds, "<=", 50),
            ("bytes on disk per row", size / rows, "<=", 100),
            (f"seconds for one operand's course, {rows:,} rows", seconds, "<=", 2),
            ("milliseconds to append 16 rows, parts and merges included", writing * 1e3, "<=", 5),
        ]
    )


if __name__ == "__main__":
    main()
