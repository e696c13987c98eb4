"""Full disks, directories that nobody may write to, clocks that jump: the run goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_fp import (
    ClampMonitor,
    EvaluationGap,
    FP8Precision,
    LossRecorder,
    ParityProbe,
    PrecisionFallback,
    StabilityMonitor,
    StagedRollout,
)
from lightning_fp.cli import main
from lightning_fp.loop import PrecisionLoop
from lightning_fp.records import (
    Note,
    StatisticsWriter,
    read_events,
    read_statistics,
    read_steps,
)
from lightning_fp.records.event_log import EventLog
from lightning_fp.report import read_records
from lightning_fp.telemetry.step_record import StepRecorder
from tests.helper import LanguageModel, make_trainer, text_loader
from tests.report.large_run import write_large_run

FULL = Path("/dev/full")
"""Every write to it fails as on a disk without room."""

needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")

STEPS = 6


def callbacks(directory: Path | None) -> list[Any]:
    return [
        ClampMonitor(every_n_steps=2, log_every_n_steps=2, dirpath=directory),
        PrecisionFallback(rehearse=False, dirpath=directory),
        StagedRollout("aggressive", dirpath=directory),
        ParityProbe(every_n_steps=2, dirpath=directory),
        EvaluationGap(batches=1, dirpath=directory),
        StabilityMonitor(dirpath=directory),
        LossRecorder(directory),
    ]


class Validated(LanguageModel):
    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        self.log("val_loss", self.val_losses[-1])


def run(directory: Path | None, first: Sequence[L.Callback] = (), **options: Any) -> LanguageModel:
    model = Validated(blocks=1)
    trainer = make_trainer(
        FP8Precision("delayed"),
        callbacks=[*first, *callbacks(directory)],
        max_steps=STEPS,
        log_every_n_steps=2,
        val_check_interval=3,
        limit_val_batches=1,
        **options,
    )
    trainer.fit(model, text_loader(4 * STEPS), text_loader(8))
    return model


def loop(directory: Path) -> PrecisionLoop:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return PrecisionLoop(
        model,
        optimizer,
        "delayed",
        recipe="aggressive",
        dirpath=directory,
        monitor={"every_n_steps": 2, "log_every_n_steps": 2},
        parity={"every_n_steps": 2},
        stability=True,
        log_every_n_steps=2,
        progress=False,
    )


def train(own: PrecisionLoop) -> None:
    own.step(lambda batch: own.model(batch).square().mean(), torch.ones(4, 16))


def run_loop(directory: Path) -> int:
    with loop(directory) as own:
        for _ in range(STEPS):
            train(own)
    return own.global_step


FILES = ("events.jsonl", "run.jsonl", "loss.csv", "parity.jsonl", "eval_gap.csv", "mismatch.csv")


def fill(directory: Path) -> None:
    """Every file of its records is on a disk without room from now on."""
    for name in FILES:
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(FULL)


class Fills(L.Callback):
    """The disk is full when the training begins."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        fill(next(c.run_dir for c in trainer.callbacks if isinstance(c, LossRecorder)))


@needs_full
def test_a_full_disk_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each failure is told once."""
    assert len(run(tmp_path / "run", first=[Fills()]).losses) >= STEPS
    for what in ("events", "losses", "the evaluation gap"):
        assert caplog.text.count(f"{what} cannot be written") == 1, what
    caplog.clear()
    with loop(tmp_path / "loop") as own:
        train(own)
        fill(tmp_path / "loop")
        for _ in range(STEPS):
            train(own)
    assert own.global_step == STEPS + 1
    assert caplog.text.count("losses cannot be written") == 1


def test_a_full_disk_for_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Parquet is written by its own library, under a name that is taken away again."""

    def full(table: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"PAR1 and a part of it")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("lightning_fp.records.tables.pq.write_table", full)
    assert len(run(tmp_path / "run").losses) >= STEPS
    assert "No space left on device" in caplog.text
    monkeypatch.undo()
    assert read_statistics(tmp_path / "run").num_rows == 0
    assert read_steps(tmp_path / "run").num_rows == STEPS
    read_records(tmp_path / "run")
    again = StatisticsWriter(tmp_path / "run", step=STEPS)
    again.append({"step": [STEPS + 1], "layer": ["a"]})
    again.flush()
    assert read_statistics(tmp_path / "run")["step"].to_pylist() == [STEPS + 1]


def blocked(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place where no directory can be made."""
    if kind == "file":
        (tmp_path / "file").write_text("")
        return tmp_path / "file" / "run"
    made = Path.mkdir

    def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
        if "shut" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        made(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    return tmp_path / "shut" / "run"


@pytest.mark.parametrize("kind", ["file", "shut"])
def test_a_read_only_directory_ends_no_training(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = blocked(tmp_path, kind, monkeypatch)
    assert len(run(directory).losses) >= STEPS
    assert run_loop(directory) == STEPS


@pytest.mark.parametrize("kind", ["file", "shut"])
def test_commands_say_where_they_cannot_write(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = write_large_run(tmp_path / "made", layers=1, intervals=2)
    directory = blocked(tmp_path, kind, monkeypatch)
    for command in (
        ["report", str(records), "--output", str(directory / "report.html")],
        ["demo", "--steps", "8", "--output", str(directory)],
    ):
        assert main(command) == 2, command
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith(f"lightning-fp {command[0]}: ")
        assert str(directory) in line


@needs_full
def test_a_report_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = write_large_run(tmp_path / "made", layers=1, intervals=2)
    assert main(["report", str(records), "--output", str(FULL)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == f"lightning-fp report: cannot write {FULL}: No space left on device"


# -- clocks ----------------------------------------------------------------------------------------


class Jumps:
    """A clock that goes back an hour every third time, and stands still otherwise."""

    def __init__(self) -> None:
        self.now, self.asked = 1e6, 0

    def __call__(self) -> float:
        self.asked += 1
        if self.asked % 3 == 0:
            self.now -= 3600
        return self.now


@pytest.mark.parametrize("clock", ["time", "monotonic", "perf_counter"])
def test_a_clock_that_goes_back(
    clock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = Jumps()
    monkeypatch.setattr(time, clock, jumps)
    for module in ("telemetry.step_record", "telemetry.parity_log"):
        monkeypatch.setattr(f"lightning_fp.{module}.perf_counter", jumps)
    assert run_loop(tmp_path) == STEPS
    monkeypatch.undo()
    assert read_steps(tmp_path)["step"].to_pylist() == list(range(1, STEPS + 1))
    assert [event.step for event in read_events(tmp_path)]
    read_records(tmp_path)
    assert main(["report", str(tmp_path)]) == 0


def test_no_step_took_less_than_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a report would show as a speed."""
    clock: list[float] = [10.0]
    monkeypatch.setattr("lightning_fp.telemetry.step_record.perf_counter", lambda: clock[0])
    recorder = StepRecorder()
    recorder.begin(0)
    clock[0] = 5.0
    record = recorder.end(1)
    assert record is not None
    assert record.seconds == 0


def test_events_from_a_clock_that_went_back_keep_their_order(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    for step, at in enumerate((2e9, 1.0, 3e9)):
        log.write(Note(step=step, reason=f"at {at}", time=at))
    assert [event.step for event in read_events(tmp_path)] == [0, 1, 2]
