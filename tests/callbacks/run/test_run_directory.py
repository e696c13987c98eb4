"""Every run has a directory of its own, and a resumed one goes on in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_fp import ClampMonitor, FP8Precision, LossRecorder, PrecisionFallback
from lightning_fp.records import read_loss, read_run
from lightning_fp.records.newest_run import newest_run
from lightning_fp.report import read_records
from tests.helper import LanguageModel, make_trainer, text_loader


class Save(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def train(
    root: Path,
    dirpath: Path | None = None,
    *,
    steps: int = 3,
    ckpt: Path | None = None,
    save: Path | None = None,
    **options: Any,
) -> Path | None:
    """Where a run writes that begins here, or goes on from a checkpoint."""
    recorder = LossRecorder(dirpath)
    callbacks = [recorder, *([Save(save)] if save else [])]
    trainer = make_trainer(
        None, callbacks=callbacks, max_steps=steps, default_root_dir=root, **options
    )
    trainer.fit(LanguageModel(), text_loader(40), ckpt_path=ckpt)
    return recorder.run_dir


def test_without_a_logger_each_run_has_a_version(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = tmp_path / "runs" / "LanguageModel"
    with caplog.at_level("INFO"):
        assert [train(tmp_path) for _ in range(2)] == [runs / "version_0", runs / "version_1"]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert f"records: {runs / 'version_1'} (lightning-fp report {runs / 'version_1'})" in (
        caplog.messages
    )


def test_a_directory_that_was_named_belongs_to_its_first_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = [train(tmp_path, run) for _ in range(3)]
    assert found == [run, run / "version_1", run / "version_2"]
    assert [len(read_run(path)) for path in found] == [1, 1, 1]
    assert len(read_records(run).starts) == 1  # and no second run told as its resume


@pytest.mark.parametrize("name", [None, "run"])
def test_a_resumed_run_goes_on_where_it_was(name: str | None, tmp_path: Path) -> None:
    dirpath, ckpt = None if name is None else tmp_path / name, tmp_path / "2.ckpt"
    train(tmp_path, dirpath)
    second = train(tmp_path, dirpath, save=ckpt)
    train(tmp_path, dirpath)  # a third, which is not meant
    assert train(tmp_path, dirpath, steps=5, ckpt=ckpt) == second
    assert second is not None
    assert second.name == "version_1"
    assert read_loss(second).steps.tolist() == [1, 2, 3, 4, 5]
    assert [start.step for start in read_run(second)] == [0, 2]


def test_what_goes_on_in_one_trainer_is_one_run(tmp_path: Path) -> None:
    recorder = LossRecorder(tmp_path)
    trainer = make_trainer(None, callbacks=[recorder], max_steps=2)
    model = LanguageModel()
    for steps in (2, 4):
        trainer.fit_loop.epoch_loop.max_steps = steps
        trainer.fit(model, text_loader(40))
    assert recorder.run_dir == tmp_path
    assert len(read_run(tmp_path)) == 2


def test_beside_a_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    assert train(tmp_path, logger=logger) == Path(logger.log_dir)
    assert train(tmp_path, logger=logger) == Path(logger.log_dir) / "version_1"

    class Remote(DummyLogger):
        """Keeps its runs elsewhere; here it has a place for files, as W&B's has."""

        name, version, save_dir = "project", "a1b2", str(tmp_path)

    assert train(tmp_path, logger=Remote()) == tmp_path / "project" / "a1b2"


def test_a_directory_above_means_the_newest_run(tmp_path: Path) -> None:
    monitor = ClampMonitor()
    assert monitor.run_dir is None
    assert newest_run(tmp_path) == tmp_path
    train(tmp_path)
    last = train(tmp_path)
    for above in (tmp_path, tmp_path / "runs", tmp_path / "runs" / "LanguageModel", last):
        assert newest_run(above) == last
        assert read_records(above).path == last
        assert read_loss(above).steps.tolist() == [1, 2, 3]


class Told(CSVLogger):
    """Counts what it hears of hyperparameters."""

    heard = 0

    def log_hyperparams(self, *args: Any, **options: Any) -> None:
        self.heard += 1


@pytest.mark.parametrize(("scaling", "expected"), [("high", 0), ("dynamic", 1)])
def test_a_logger_hears_nothing_of_a_watch_that_waits(
    tmp_path: Path, scaling: Any, expected: int
) -> None:
    """TensorBoard would log hp_metric with them, in a model that is in high precision."""
    logger = Told(tmp_path)
    trainer = make_trainer(
        FP8Precision(scaling), callbacks=[PrecisionFallback()], logger=logger, max_steps=1
    )
    trainer.fit(LanguageModel(), text_loader(8))
    assert logger.heard == expected
