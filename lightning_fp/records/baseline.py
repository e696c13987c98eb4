"""What a recorded run is measured by: its loss, its gradients, the time of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from lightning_fp.argument_types import checked
from lightning_fp.records.loss import FILE, read_steps
from lightning_fp.records.step_rows import numbers

TAIL = 10
"""The last loss is the mean over one in so many of the steps, at the end: one step is noise."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The figures of a run, usually one in high precision, that others are compared with."""

    steps: int
    """Optimizer steps that were recorded."""

    mean_loss: float
    """Over all steps that have a finite loss."""

    last_loss: float
    """Mean over the last tenth of the steps; not finite if one of them is not."""

    last_steps: int
    """How many steps that is."""

    step_seconds: float | None
    """Median time of a step, data loading included; None if it was not recorded."""

    grad_norm: float | None
    """Median norm of the gradient before clipping; None if it was not recorded."""

    nonfinite_steps: int
    """Steps whose loss is inf or NaN."""


@checked
def read_baseline(run_dir: str | Path) -> Baseline:
    """The figures of a run that LossRecorder or ClampMonitor has recorded.

    Args:
        run_dir: the directory it wrote to.

    Raises:
        ValueError: if there is no `loss.csv`, or no finite loss in it.
    """
    table = read_steps(run_dir)
    if not len(table):
        raise ValueError(
            f"{str(run_dir)!r} must have a {FILE}, got none; record a baseline with"
            " `lightning-fp baseline`, or add LossRecorder() to the run"
        )
    loss = numbers(table["loss"])
    finite = loss[torch.isfinite(loss)]
    if not len(finite):
        raise ValueError(f"the baseline in {str(run_dir)!r} must have a finite loss, got none")
    tail = loss[-math.ceil(len(loss) / TAIL) :]
    return Baseline(
        steps=len(loss),
        mean_loss=float(finite.mean()),
        last_loss=float(tail.mean()),
        last_steps=len(tail),
        step_seconds=_median(table["seconds"]),
        grad_norm=_median(table["grad_norm"]),
        nonfinite_steps=len(loss) - len(finite),
    )


def _median(column: pa.ChunkedArray) -> float | None:
    values: Tensor = numbers(column)
    known = values[torch.isfinite(values)]
    return float(known.quantile(0.5)) if len(known) else None
