"""Synthetic runs: a noisy loss with spikes, and statistics as ClampMonitor would have left them."""

from __future__ import annotations

import pyarrow as pa
import torch
from torch import Tensor

from lightning_fp.records.tables import SCHEMA
from lightning_fp.study import Loss

STEPS = 600
COLUMNS = pa.schema(
    [
        SCHEMA.field(name)
        for name in ("step", "layer", "operand", "sampled_steps", "headroom_bits", "clamped_mass")
    ]
)
OPERANDS = ("input", "weight", "grad_output")


def noise(*shape: int, seed: int, memory: float = 0.8) -> Tensor:
    """Autocorrelated, of unit variance: float64 [..., steps]."""
    draws = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    course = draws.clone()
    for step in range(1, shape[-1]):
        course[..., step] = memory * course[..., step - 1]
        course[..., step] += (1 - memory**2) ** 0.5 * draws[..., step]
    return course


def spiky_loss(events: Tensor, *, steps: int = STEPS, seed: int = 0, height: float = 1.0) -> Loss:
    """Falling, with noise, and with spikes of two steps at the events (steps from 1)."""
    at = torch.arange(1, steps + 1)
    generator = torch.Generator().manual_seed(seed)
    values = 2 + 2 * torch.exp(-at / 100.0) + 0.03 * torch.randn(steps, generator=generator)
    values = values.double()
    values[events - 1] += height
    values[(events - 1 + 1).clamp(max=steps - 1)] += height / 2
    return Loss.of(at, values)


def some_events(count: int, *, steps: int = STEPS, seed: int = 0) -> Tensor:
    """Steps of spikes: at random, at least 24 apart."""
    generator = torch.Generator().manual_seed(seed)
    slack = steps - 120 - 24 * count
    places = torch.randint(slack, (count,), generator=generator).sort().values
    return 100 + places + 24 * torch.arange(count)


def table(
    mass: dict[tuple[str, str], Tensor],
    *,
    interval: int = 1,
    every: int = 1,
    headroom: dict[tuple[str, str], Tensor] | None = None,
    seed: int = 0,
) -> pa.Table:
    """Rows by interval, of masses by step; every n-th step is sampled, at a random place in it."""
    steps = len(next(iter(mass.values())))
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(every, (len(range(0, steps, every)),), generator=generator)
    sampled = torch.zeros(steps, dtype=torch.bool)
    sampled[(torch.arange(0, steps, every) + places).clamp(max=steps - 1)] = True
    parts = list(
        zip(range(0, steps, interval), [*range(interval, steps, interval), steps], strict=True)
    )
    begins, ends = (torch.tensor(edge) for edge in zip(*parts, strict=True))

    def total(course: Tensor) -> Tensor:
        sums = torch.cat([torch.zeros(1), course.cumsum(0)])
        return sums[ends] - sums[begins]

    counts = total(sampled.double())
    tables = []
    for (layer, operand), course in mass.items():
        course = torch.where(course > 1e-9, course, 0.0)  # a difference of sums is not exact
        low = None if headroom is None else headroom[layer, operand]
        means = total(torch.where(sampled, course, 0.0)) / counts  # NaN without a sample
        tables.append(
            pa.table(
                {
                    "step": ends.numpy(),
                    "layer": [layer] * len(parts),
                    "operand": [operand] * len(parts),
                    "sampled_steps": counts.int().numpy(),
                    "headroom_bits": [
                        None if low is None else float(low[b:e].min()) for b, e in parts
                    ],
                    "clamped_mass": pa.array(means.float().numpy(), from_pandas=True),
                },
                schema=COLUMNS,
            )
        )
    return pa.concat_tables(tables)


def unrelated_masses(layers: int, *, steps: int = STEPS, seed: int = 0) -> dict:
    """Clamping that knows nothing of the loss: autocorrelated, mostly small, sometimes large."""
    course = noise(layers * len(OPERANDS), steps, seed=seed)
    courses = iter((course.clamp(min=0) ** 3 * 1e-3).unbind(0))
    return {
        (f"blocks.{i}.fc", operand): next(courses) for i in range(layers) for operand in OPERANDS
    }


def tied_masses(events: Tensor, layers: int = 4, *, steps: int = STEPS, seed: int = 0) -> dict:
    """The same, but the input of blocks.2.fc clamps up to two steps before most of the events."""
    masses = unrelated_masses(layers, steps=steps, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    lead = torch.randint(3, events.shape, generator=generator)
    hit = torch.rand(events.shape, generator=generator) < 0.9
    masses["blocks.2.fc", "input"][(events - 1 - lead)[hit]] += 0.03
    return masses
