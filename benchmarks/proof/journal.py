"""A journal of cells that were measured, a line each: a run that is killed has lost nothing."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def measured(path: Path) -> list[Row]:
    """The rows that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(
    path: Path,
    work: Iterable[Row],
    run: Callable[[Row], Row],
    *,
    jobs: int,
    key: Callable[[Row], Sequence[object]],
) -> list[Row]:
    """Run what is missing; each result is on disk before the next is waited for.

    Args:
        path: of the journal.
        work: what is wanted.
        run: makes of a piece of work its row, with the same key.
        jobs: processes; 1 is this one.
        key: what a piece of work and its row have in common.
    """
    known = {tuple(key(row)) for row in measured(path)}
    wanted = {tuple(key(each)): each for each in work}  # some of it twice
    missing = [each for name, each in wanted.items() if name not in known]
    path.parent.mkdir(parents=True, exist_ok=True)
    if jobs == 1:
        for each in missing:
            _write(path, run(each), key)
        return measured(path)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run, each) for each in missing]):
            _write(path, done.result(), key)
    return measured(path)


def _write(path: Path, row: Row, key: Callable[[Row], Sequence[object]]) -> None:
    with path.open("a") as journal:
        journal.write(json.dumps(row) + "\n")
    print(*key(row), flush=True)


def quiet() -> None:
    """Nothing but what was measured is worth a line."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
