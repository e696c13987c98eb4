"""The runs that predictors are studied on: their signals by step, and where they failed.

A sweep's directory says of each cell whether and where it diverged; of any other run our detector
says so, from its losses.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from lightning_fp.records import read_loss, read_stability
from lightning_fp.stability import DivergenceDetector

CELLS = "cells.parquet"
"""What a sweep writes: a row per cell."""


@dataclass(frozen=True, kw_only=True)
class StudiedRun:
    """One run."""

    name: str
    seed: int
    failed_at: int | None
    """Optimizer steps done when it diverged; None: it did not."""

    signals: Mapping[str, Mapping[int, float]]
    """By signal, by optimizer steps done; only numbers."""

    def value(self, name: str, step: int, window: int) -> float | None:
        """The median of a signal over the steps up to one, each of which was seen to be a number.

        Args:
            name: of the signal.
            step: the last step.
            window: how many steps.
        """
        by_step = self.signals.get(name)
        if by_step is None or step not in by_step:
            return None
        seen = [by_step[each] for each in range(step - window + 1, step + 1) if each in by_step]
        return statistics.median(seen)


def read_runs(directories: Sequence[str | Path]) -> list[StudiedRun]:
    """The runs below some directories.

    Args:
        directories: each of a sweep, whose cells are taken, or of one run.

    Raises:
        ValueError: if a directory is neither, or has no signals.
    """
    runs: list[StudiedRun] = []
    for place in dict.fromkeys(Path(each) for each in directories):
        if not place.is_dir():
            raise ValueError(f"there is no directory {str(place)!r}")
        if (place / CELLS).is_file():
            runs += _of_sweep(place)
        else:
            runs.append(_of_run(place, seed=len(runs)))
    return runs


def _of_sweep(place: Path) -> list[StudiedRun]:
    rows: list[dict[str, Any]] = pq.read_table(place / CELLS).to_pylist()
    runs: list[StudiedRun] = []
    for row in rows:
        directory = place / "cells" / str(row["id"])
        if row.get("error") or not directory.is_dir():
            continue
        step = row.get("diverged_step")
        failed = int(step) if row["diverged"] and step is not None else None
        runs.append(
            StudiedRun(
                name=str(row["id"]),
                seed=int(row["seed"]),
                failed_at=failed,
                signals=_signals(directory),
            )
        )
    if not any(run.signals for run in runs):
        raise ValueError(
            f"the cells of {str(place)!r} have no signals: run the sweep with"
            " --axis signals=on, in a directory of its own"
        )
    return runs


def _of_run(place: Path, seed: int) -> StudiedRun:
    signals = _signals(place)
    if not signals:
        raise ValueError(
            f"no signals in {str(place)!r}: it must be the directory of a run with a"
            f" StabilityMonitor, or of a sweep, with a {CELLS}"
        )
    return StudiedRun(name=place.name, seed=seed, failed_at=_diverged(place), signals=signals)


def _signals(place: Path) -> dict[str, dict[int, float]]:
    """By name; empty where nothing was measured."""
    try:
        table = read_stability(place)
    except FileNotFoundError:
        return {}
    columns: dict[str, list[Any]] = table.to_pydict()
    steps = columns.pop("step")
    found = {
        name: {
            step: value
            for step, value in zip(steps, values, strict=True)
            if value is not None and math.isfinite(value)
        }
        for name, values in columns.items()
    }
    return {name: by_step for name, by_step in found.items() if by_step}


def _diverged(place: Path) -> int | None:
    """Where our detector calls the losses of a run diverged."""
    loss = read_loss(place)
    detector = DivergenceDetector()
    state = detector.init()
    for step, value in zip(loss.steps.tolist(), loss.values.tolist(), strict=True):
        state, decision = detector.step(state, loss=value)
        if decision.kind == "diverged":
            return int(step)
    return None
