"""Writers in several threads, and in processes that were forked from a run."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lightning_fp import ClampMonitor, FP8Precision, LossRecorder, PrecisionFallback
from lightning_fp.records import (
    EvaluationRow,
    EvaluationWriter,
    EventWriter,
    LossRow,
    LossWriter,
    MismatchWriter,
    Note,
    StatisticsWriter,
    read_evaluation,
    read_events,
    read_mismatch,
    read_statistics,
    read_steps,
)
from lightning_fp.records.jsonl import append_line
from lightning_fp.telemetry import Board
from tests.helper import LanguageModel, make_trainer, text_rows

THREADS, EACH = 8, 40

LONG = "x" * 5000
"""A line of events that no buffer holds."""


def in_threads(write: Callable[[int], None]) -> None:
    """All threads write at once; `write` is given each number once."""
    start, errors = threading.Barrier(THREADS), []

    def work(thread: int) -> None:
        start.wait()
        try:
            for number in range(EACH):
                write(thread * EACH + number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


ALL = set(range(THREADS * EACH))


def test_events_of_many_threads(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path)
    in_threads(lambda n: writer.append(Note(step=0, reason=LONG, numbers={"n": float(n)})))
    assert {int(event.numbers["n"]) for event in read_events(tmp_path)} == ALL


def test_lines_of_many_threads_and_writers(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    in_threads(lambda n: append_line(path, {"n": n, "long": LONG}))
    assert {json.loads(line)["n"] for line in path.read_text().splitlines()} == ALL


def test_rows_of_statistics_of_many_threads(tmp_path: Path) -> None:
    """Parts are written and merged meanwhile; none is lost, none is there twice."""
    writer = StatisticsWriter(tmp_path, rows_per_part=3)
    in_threads(lambda n: writer.append({"step": [n], "layer": [str(n)]}))
    writer.flush()
    found = read_statistics(tmp_path)["step"].to_pylist()
    assert len(found) == len(ALL)
    assert set(found) == ALL


def test_rows_of_losses_of_many_threads(tmp_path: Path) -> None:
    """One header, and whole rows; the reader puts later steps in the place of earlier ones."""
    losses, gaps, mismatch = (
        LossWriter(tmp_path),
        EvaluationWriter(tmp_path),
        MismatchWriter(tmp_path),
    )

    def write(number: int) -> None:
        losses.append([LossRow(step=number, loss=1.0)])
        gaps.append(EvaluationRow(step=number, loss=2.0, loss_high=1.0))
        mismatch.append(number, {"k3_kl": 1.0})

    in_threads(write)
    for name in ("loss.csv", "eval_gap.csv", "mismatch.csv"):
        header, *rows = (tmp_path / name).read_text().splitlines()
        assert header.startswith("step,")
        assert {int(row.split(",")[0]) for row in rows} == ALL
        assert {row.count(",") for row in rows} == {header.count(",")}
    for read in (read_steps, read_evaluation, read_mismatch):
        assert read(tmp_path).num_rows > 0


def test_a_board_of_many_threads() -> None:
    board = Board()
    follower = board.follow(["a"])
    in_threads(lambda n: board.publish("a", n, float(n)))
    assert {m.step for m in follower.take()["a"]} == ALL


# -- forks -----------------------------------------------------------------------------------------

fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def in_a_fork(work: Callable[[], object]) -> None:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(30)
    assert process.exitcode == 0


@fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_writes_nothing_twice(tmp_path: Path) -> None:
    """Rows that are held back belong to the process that was given them."""
    writer = StatisticsWriter(tmp_path, seconds=1e9)
    writer.append({"step": [1], "layer": ["a"]})
    in_a_fork(writer.flush)  # as at the end of a worker that has a copy
    assert read_statistics(tmp_path).num_rows == 0
    writer.append({"step": [2], "layer": ["a"]})
    writer.flush()
    assert read_statistics(tmp_path)["step"].to_pylist() == [1, 2]


@fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_takes_no_lock_with_it(tmp_path: Path) -> None:
    """A thread holds the writer's lock when the process forks; the child can still write."""
    writer = EventWriter(tmp_path)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            writer.append(Note(step=0, reason=LONG))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for number in range(5):
            in_a_fork(lambda n=number: writer.append(Note(step=n, reason="of a child")))
    finally:
        stop.set()
        thread.join()
    events = read_events(tmp_path)
    assert sum(event.reason == "of a child" for event in events) == 5
    assert {event.reason for event in events} == {LONG, "of a child"}


class FromWorkers(LanguageModel):
    """Its batches come from processes that were forked from the run."""

    def train_dataloader(self) -> Any:

        return DataLoader(
            text_rows(32), batch_size=4, num_workers=1, multiprocessing_context="fork"
        )


@fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_loader_workers_leave_the_records_alone(tmp_path: Path) -> None:
    callbacks = [
        ClampMonitor(every_n_steps=1, log_every_n_steps=2, dirpath=tmp_path),
        PrecisionFallback(rehearse=False),
        LossRecorder(),
    ]
    trainer = make_trainer(FP8Precision("delayed"), callbacks=callbacks, max_epochs=2)
    trainer.fit(FromWorkers(blocks=1))
    assert read_steps(tmp_path)["step"].to_pylist() == list(range(1, trainer.global_step + 1))
    steps = read_statistics(tmp_path)["step"].to_pylist()
    assert set(steps) == set(range(2, trainer.global_step + 1, 2))
    assert len(read_events(tmp_path)) == len({event.time for event in read_events(tmp_path)})
