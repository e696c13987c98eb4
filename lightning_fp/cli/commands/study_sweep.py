"""Measure how often formats fail at which learning rates: `lightning-fp study sweep`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_fp.choices import check_at_least, check_choice
from lightning_fp.cli.commands.sweep_progress import progress
from lightning_fp.cli.commands.sweep_speed import Hardware, predicted
from lightning_fp.cli.loading import find_factory
from lightning_fp.cli.output import console, print_json
from lightning_fp.demo.presets import PRESETS
from lightning_fp.demo.run import quiet_lightning
from lightning_fp.recipes.format_evidence import what_evidence_cannot_say
from lightning_fp.study.emit import formats_to_judge, recipe_of
from lightning_fp.study.sweep.factory import CellFactory
from lightning_fp.study.sweep.findings import Findings
from lightning_fp.study.sweep.grid import grid, parse_axes
from lightning_fp.study.sweep.results import read_cells
from lightning_fp.study.sweep.sweep import Sweep
from lightning_fp.study.sweep.words import SUMMARY, format_cells
from lightning_fp.study.total_cost import TotalCost, total_costs
from lightning_fp.terminal import FittedTable


# `json` is the name of the option.
def run(
    factory: str | None,
    *,
    preset: str | None,
    formats: str,
    lr: str,
    seeds: int,
    steps: int,
    axis: Sequence[str],
    dir: str,
    storage: str | None,
    threads: int,
    speedup: float | None,
    hardware: Hardware | None,
    emit: str | None,
    json: bool,
) -> int:
    """Train every cell, and print what they say; see `commands.study_sweep`.

    Raises:
        ValueError: for what the user can put right.
    """
    if (factory is None) == (preset is None):
        raise ValueError("give either FACTORY, as module:factory, or --preset tiny")
    if preset is not None:
        check_choice("--preset", preset, list(PRESETS))
    check_at_least(1, **{"--seeds": seeds, "--threads": threads})
    check_at_least(10, **{"--steps": steps})
    if speedup is not None and not (math.isfinite(speedup) and speedup > 0):
        raise ValueError(f"--speedup must be above 0, got {speedup}")
    if speedup is not None and hardware is not None:
        raise ValueError("give either --speedup or --hardware, which predicts one")
    reference = f"preset {preset}" if factory is None else factory
    make = PRESETS[preset] if preset is not None else find_factory(str(factory))
    directory = Path(dir)
    sweep = Sweep(
        factory=CellFactory(reference, make),
        cells=grid(_names(formats), _numbers("--lr", lr), range(seeds), parse_axes(axis)),
        steps=steps,
        directory=directory,
        storage=storage,
        threads=threads,
    )
    if emit is not None:
        _check_emit(sweep, Path(emit))
    bar = progress(console(stderr=json), len(sweep.cells), steps, directory)
    with quiet_lightning(), bar as spectator:
        findings = sweep.run(spectator)
    costs = total_costs(read_cells(directory), findings)
    speedups: dict[str, float | None] = dict.fromkeys((each.format for each in costs), speedup)
    if hardware is not None:
        speedups = predicted(sweep, hardware)
    if json:
        print_json(
            {
                **as_plain(findings),
                "costs": [as_cost(each, speedups.get(each.format)) for each in costs],
            }
        )
    else:
        screen = console()
        for table in tables(findings):
            screen.print(table)
        late = what_evidence_cannot_say(each.format for each in findings.formats)
        told = [each.sentence(speedups.get(each.format)) for each in costs]
        if hardware is not None:
            told.append(f"Speed-ups are predicted for {hardware}, by `lightning-fp plan`.")
        for sentence in (*told, *late):
            screen.print(sentence, markup=False, soft_wrap=True)
        text = f"Written to {directory}: cells.parquet, sweep.html"
        screen.print(text, markup=False, soft_wrap=True)
    if emit is not None:
        _emit(findings, Path(emit))
        console(stderr=json).print(f"Recipe written to {emit}", markup=False, soft_wrap=True)
    for id, error in findings.errors.items():
        console(stderr=True).print(f"{id} could not run: {error}", markup=False, soft_wrap=True)
    return 1 if findings.errors else 0


def _check_emit(sweep: Sweep, path: Path) -> None:
    """Say before hundreds of runs, and not after them, what would stop a recipe."""
    formats_to_judge(list(dict.fromkeys(cell.format for cell in sweep.cells)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--emit {path}: {error.strerror or error}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--emit {path} must be a file that can be written")


def _emit(findings: Findings, path: Path) -> None:
    recipe = recipe_of(findings)
    try:
        path.write_text(recipe.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--emit {path}: {error.strerror or error}") from error


# -- what is given --------------------------------------------------------------------------------


def _names(text: str) -> list[str]:
    """Names with commas between, save those in brackets: "bf16,fp8-dynamic[weight=e5m2]"."""
    names: list[str] = []
    depth, name = 0, ""
    for character in text + ",":
        depth += (character == "[") - (character == "]")
        if character == "," and depth <= 0:
            names.append(name.strip())
            name = ""
        else:
            name += character
    return [name for name in names if name]


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(
            f"{option} must be numbers with commas between, got {text!r}; e.g. 1e-3,3e-3"
        ) from error


# -- what it came to ------------------------------------------------------------------------------


def tables(findings: Findings) -> list[FittedTable]:
    """The findings for a terminal: failures by rate, then a line for each format."""
    lrs = sorted({rate.lr for each in findings.formats for rate in each.rates})
    columns = [f"{lr:g}" for lr in lrs]
    rates = FittedTable("Runs that failed, by learning rate", "format", *columns, right=columns)
    for each in findings.formats:
        by_lr = {rate.lr: rate for rate in each.rates}
        cells = [f"{by_lr[lr].failed}/{by_lr[lr].runs}" if lr in by_lr else "" for lr in lrs]
        rates.add_row(each.name, *cells)
    summary = FittedTable("Formats", "format", *SUMMARY, right=SUMMARY)
    for each in findings.formats:
        summary.add_row(each.name, *format_cells(each).values())
    return [rates, summary]


def as_plain(findings: Findings) -> dict[str, Any]:
    """For JSON."""
    formats = [
        {**asdict(each), "runs": each.runs, "failed": each.failed} for each in findings.formats
    ]
    return {**asdict(findings), "formats": formats}


def as_cost(cost: TotalCost, speedup: float | None) -> dict[str, Any]:
    """For JSON."""
    at = None if speedup is None else cost.at(speedup)
    return {**asdict(cost), "sentence": cost.sentence(speedup), "cost_at_speedup": at}
