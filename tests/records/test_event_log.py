"""Where a run writes, what is written once, and what its loggers hear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from typing_extensions import override

from lightning_fp import FP8Precision
from lightning_fp.callbacks import ClampMonitor, EvaluationGap, LossRecorder, ParityProbe
from lightning_fp.callbacks.run.run import RunCallback, run_of
from lightning_fp.callbacks.run.run_settings import flat, settings_by_class
from lightning_fp.records import Note, read_events, read_run
from tests.helper import LanguageModel, fit, make_trainer, text_loader


class Writes(RunCallback):
    """Writes one event at every step."""

    def __init__(self, name: str, dirpath: Path | None = None) -> None:
        self.name, self.dirpath = name, dirpath
        self.directory: Path | None = None
        self.log: Any = None

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.directory = run_of(trainer).directory(self)
        self.log = run_of(trainer).log(self)

    @override
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.log.write(Note(step=trainer.global_step, reason=self.name), quiet=True)
        self.log.count(self.name, trainer.global_step)


def notes(directory: Path) -> list[tuple[int, str]]:
    return [(e.step, e.reason) for e in read_events(directory) if isinstance(e, Note)]


# -- where -----------------------------------------------------------------------------------------


def test_records_of_a_run_lie_together(tmp_path: Path) -> None:
    """In the directory that one callback names, unless another has one of its own."""
    one, two, own = Writes("a"), Writes("b", tmp_path / "run"), Writes("c", tmp_path / "own")
    fit(FP8Precision(), max_steps=2, callbacks=[one, two, own], default_root_dir=tmp_path / "root")
    assert notes(tmp_path / "run") == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert notes(tmp_path / "own") == [(1, "c"), (2, "c")]
    assert one.log is two.log is not own.log
    assert [len(read_run(tmp_path / name)) for name in ("run", "own")] == [1, 1]
    assert not (tmp_path / "root").exists()


def test_without_a_name_it_is_the_loggers_directory(tmp_path: Path) -> None:
    one = Writes("a")
    logger = CSVLogger(tmp_path, name="log")
    trainer = make_trainer(None, callbacks=[one], logger=logger, max_steps=1)
    trainer.fit(LanguageModel(), text_loader(8))
    assert one.directory == Path(logger.log_dir) == one.run_dir
    assert notes(one.directory) == [(1, "a")]


def test_each_fit_is_a_start_of_the_run(tmp_path: Path) -> None:
    """Also one that follows an interrupted fit of the same Trainer, which calls no teardown."""

    class Interrupt(L.Callback):
        armed = False

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if self.armed:
                raise RuntimeError("interrupted")

    interrupt, one = Interrupt(), Writes("a", tmp_path)
    trainer = make_trainer(None, callbacks=[one, interrupt], max_steps=2)
    model = LanguageModel()
    trainer.fit(model, text_loader(40))
    first, interrupt.armed = one.log, True
    trainer.fit_loop.epoch_loop.max_steps = 4
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.fit(model, text_loader(40))
    second, interrupt.armed = one.log, False
    trainer.fit(model, text_loader(40))
    assert [start.step for start in read_run(tmp_path)] == [0, 2, 3]
    assert len({id(log) for log in (first, second, one.log)}) == 3
    assert [step for step, _ in notes(tmp_path)] == [1, 2, 3, 4]


def test_a_fast_dev_run_leaves_nothing(tmp_path: Path) -> None:
    one = Writes("a")
    trainer = make_trainer(None, callbacks=[one], fast_dev_run=True, default_root_dir=tmp_path)
    trainer.fit(LanguageModel(), text_loader(8))
    assert one.directory is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_be_described_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("lightning_fp.callbacks.run.run.write_run", full)
    model = fit(None, max_steps=2, callbacks=[Writes("a", tmp_path), Writes("b", tmp_path)])
    assert len(model.losses) == 2
    assert caplog.text.count("what this run is cannot be written down") == 1


# -- what the run is -------------------------------------------------------------------------------


def test_the_run_says_what_it_is(tmp_path: Path) -> None:
    plugin = FP8Precision("delayed", layers={"*.fc1": "bf16"})
    model = fit(plugin, max_steps=1, callbacks=[ClampMonitor(sample=4, dirpath=tmp_path)])
    (run,) = read_run(tmp_path)
    assert run.settings["FP8Precision"]["layers"] == {"*.fc1": "bf16"}
    assert run.settings["ClampMonitor"]["sample"] == 4
    formats = {layer.name: layer.format for layer in run.layers}
    assert formats["model.blocks.0.fc1"] == "bf16"
    assert formats["model.blocks.0.fc2"] == "fp8-delayed"
    assert run.parameters == sum(p.numel() for p in model.parameters())
    assert {"lightning-fp", "torch", "lightning", "python"} <= run.versions.keys()
    assert (run.world_size, run.strategy) == (1, "SingleDeviceStrategy")
    assert run.device


def test_settings_of_two_callbacks_of_one_class() -> None:
    probes = [ParityProbe(every_n_steps=10), ParityProbe(every_n_steps=20)]
    found = settings_by_class(L.Trainer(accelerator="cpu", logger=False).precision_plugin, probes)
    assert found["Precision"] == {"precision": "32-true"}
    assert found["ParityProbe"]["every_n_steps"] == 10
    assert found["ParityProbe 2"]["every_n_steps"] == 20


def test_flat() -> None:
    nested = {"a": {"b": 1, "c": {"d": None}}, "e": [1, "x"], "f": True, "g": Path("h")}
    assert flat(nested, "p") == {
        "p/a/b": 1,
        "p/a/c/d": "None",
        "p/e": "1, x",
        "p/f": True,
        "p/g": "h",
    }


# -- loggers ---------------------------------------------------------------------------------------


class WithHparams(LanguageModel):
    def __init__(self, width: int = 32) -> None:
        super().__init__(width=width)
        self.save_hyperparameters()

    def validation_step(self, batch: Any, index: int) -> Any:
        loss = self.training_step(batch, index)
        self.log("val_loss", loss)
        return loss


EXPECTED = {
    "lightning_fp/FP8Precision/scaling": "fp8-delayed",
    "lightning_fp/FP8Precision/layers/*.fc1": "bf16",
    "lightning_fp/ClampMonitor/every_n_steps": 2,
    "lightning_fp/EvaluationGap/batches": 1,
    "width": 32,
}


def train_with(logger: Any) -> None:
    trainer = make_trainer(
        FP8Precision("delayed", layers={"*.fc1": "bf16"}),
        logger=logger,
        callbacks=[
            EvaluationGap(batches=1),
            ClampMonitor(every_n_steps=2, log_every_n_steps=2),
            LossRecorder(),
        ],
        max_steps=4,
        val_check_interval=2,
        limit_val_batches=1,
        log_every_n_steps=1,
    )
    trainer.fit(WithHparams(), text_loader(40), text_loader(8))


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams import metadata

    logger = TensorBoardLogger(tmp_path)
    train_with(logger)
    written = accumulator.EventAccumulator(logger.log_dir).Reload()
    scalars = {tag: [e.step for e in written.Scalars(tag)] for tag in written.Tags()["scalars"]}
    assert scalars["fp8/clamped_mass/max"] == [2, 4]
    assert scalars["fp8/share"] == [2, 4]
    assert len(scalars["precision/eval_gap"]) == 2
    # What its HPARAMS page shows: the first of these events.
    data = written.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    shown = {
        name: getattr(value, value.WhichOneof("kind"))
        for name, value in metadata.parse_session_start_info_plugin_data(data).hparams.items()
    }
    assert EXPECTED.items() <= shown.items()
    kept = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert EXPECTED.items() <= kept.items()


def test_csv(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    train_with(logger)
    kept = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert EXPECTED.items() <= kept.items()
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"fp8/clamped_mass/max", "fp8/share", "precision/eval_gap", "val_loss"} <= set(header)


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    from lightning.pytorch.loggers import WandbLogger

    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    logger = WandbLogger(save_dir=tmp_path, offline=True, settings=wandb.Settings(silent=True))
    train_with(logger)
    config = dict(logger.experiment.config)
    summary = dict(logger.experiment.summary)
    wandb.finish()
    assert EXPECTED.items() <= config.items()
    assert {"fp8/clamped_mass/max", "fp8/share", "precision/eval_gap"} <= summary.keys()
    assert list(tmp_path.rglob("run-*.wandb"))


def test_a_logger_that_fails_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(CSVLogger):
        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            raise OSError("no space left")

    trainer = make_trainer(
        FP8Precision(), logger=Broken(tmp_path), callbacks=[LossRecorder()], max_steps=1
    )
    trainer.fit(LanguageModel(), text_loader(8))
    assert caplog.text.count("the loggers cannot be told the settings") == 1
