"""Measure how often formats fail at which learning rates: `lightning-fp study sweep`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lightning_fp import __version__
from lightning_fp.choices import check_at_least, check_choice
from lightning_fp.cli.commands.sweep_progress import progress
from lightning_fp.cli.loading import find_factory
from lightning_fp.cli.output import console, print_json
from lightning_fp.demo.presets import PRESETS
from lightning_fp.demo.run import quiet_lightning
from lightning_fp.study.sweep.cell_run import CellRun
from lightning_fp.study.sweep.cell_table import CellTable, Entry
from lightning_fp.study.sweep.database import database_errors, open_database
from lightning_fp.study.sweep.factory import CellFactory
from lightning_fp.study.sweep.findings import Findings, find
from lightning_fp.study.sweep.formats import check_formats
from lightning_fp.study.sweep.grid import grid, parse_axes
from lightning_fp.study.sweep.page import write_page
from lightning_fp.study.sweep.results import read_cells, write_cells
from lightning_fp.study.sweep.words import SUMMARY, format_cells
from lightning_fp.study.sweep.work import SweepWorker
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
    axes = parse_axes(axis)
    cells = grid(_names(formats), _numbers("--lr", lr), range(seeds), axes)
    directory = Path(dir)
    reference = f"preset {preset}" if factory is None else factory
    make = PRESETS[preset] if preset is not None else find_factory(str(factory))
    torch.set_num_threads(threads)
    maker = CellFactory(reference, make)
    settings = {"factory": reference, "steps": steps, "axes": sorted(axes), "threads": threads}
    screen, table = console(stderr=json), None
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)  # of hundreds of runs
        with quiet_lightning():
            check_formats({cell.format for cell in cells})
            maker.check_axes(list(axes))
            maker.check_state(cells, steps, directory)
            table = _begin(directory, storage, cells, settings)
            worker = CellRun(factory=maker, steps=steps, directory=directory)
            with progress(screen, len(cells), steps, directory) as spectator:
                SweepWorker(table=table, run=worker, spectator=spectator).work()
    except BaseException:
        if table is not None:  # what there is can be read, however it ended
            with suppress(Exception):
                _write(table.entries(), directory, steps)
        raise
    finally:
        logging.disable(before)
    return _report(table, directory, steps, console() if not json else None)


def _begin(
    directory: Path, storage: str | None, cells: Sequence[Any], settings: dict[str, Any]
) -> CellTable:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        table = CellTable(open_database(storage, directory))
        table.enqueue(cells, settings, {"version": __version__})
    except ImportError as error:
        raise ValueError(str(error)) from error
    except (OSError, *database_errors()) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"the sweep cannot be kept in {storage or directory}: {told}") from error
    return table


def _report(table: CellTable, directory: Path, steps: int, screen: Console | None) -> int:
    try:
        findings, page = _write(table.entries(), directory, steps)
    except (OSError, *database_errors()) as error:
        raise ValueError(
            f"cannot write to {directory}: {error}; all cells are kept: give the same command again"
        ) from error
    if screen is None:
        print_json(as_plain(findings))
    else:
        for grid in tables(findings):
            screen.print(grid)
        text = f"Written to {directory}: cells.parquet, {page.name}"
        screen.print(text, markup=False, soft_wrap=True)
    for id, error in findings.errors.items():
        console(stderr=True).print(f"{id} could not run: {error}", markup=False, soft_wrap=True)
    return 1 if findings.errors else 0


def _write(entries: Sequence[Entry], directory: Path, steps: int) -> tuple[Findings, Path]:
    write_cells(directory, entries)
    findings = find(read_cells(directory), steps)
    return findings, write_page(directory, findings)


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
