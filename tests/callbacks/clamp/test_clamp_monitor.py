"""ClampMonitor in real runs."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fp import DelayedScaling, FP8Precision
from lightning_fp.callbacks import ClampMonitor
from lightning_fp.callbacks.run.run import run_of
from lightning_fp.cli import main
from lightning_fp.layers import FPLinear, LinearFormat
from lightning_fp.numerics import COLUMN
from lightning_fp.records import (
    LossRow,
    LossWriter,
    StatisticsWriter,
    read_loss,
    read_statistics,
)
from lightning_fp.telemetry import OptimizerStep
from tests.helper import make_trainer, same_weights

NAMES = {
    *("fp8/clamped_mass/max", "fp8/clamped_mass/mean", "fp8/underflow/max", "fp8/underflow/mean"),
    *("fp8/sqnr_db/min", "fp8/headroom_bits/min", "fp8/share"),
}


class Net(L.LightningModule):
    """Three linear layers; the second's input is `gain` times larger at the steps in `spikes`."""

    def __init__(self, gain: float = 1.0, spikes: range | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))
        self.gain, self.spikes = gain, spikes
        self.losses: list[float] = []

    def loss(self, x: Tensor) -> Tensor:
        grown = self.spikes is None or self.global_step in self.spikes
        gain = self.gain if grown else 1.0
        x = scaled(self.b(scaled(torch.tanh(self.a(x)), gain)), 1 / gain)
        return (self.c(torch.tanh(x)) - 0.1).square().mean()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.loss(batch[0])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def scaled(x: Tensor, gain: float) -> Tensor:
    """`x * gain`, with a gradient that knows nothing of it."""
    return x + (x * gain - x).detach()


def loader(batch_size: int = 8) -> DataLoader:
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=batch_size)


def run(
    directory: Path,
    scaling: Any = "fp8-delayed",
    layers: dict[str, str] | None = None,
    model: L.LightningModule | None = None,
    monitor: ClampMonitor | None = None,
    callbacks: tuple[L.Callback, ...] = (),
    ckpt_path: Path | None = None,
    batch_size: int = 8,
    **options: Any,
) -> tuple[ClampMonitor, L.Trainer]:
    monitor = monitor or ClampMonitor(every_n_steps=4, log_every_n_steps=8)
    trainer = make_trainer(
        FP8Precision(scaling, layers=layers),
        **{
            "max_steps": 16,
            "callbacks": [monitor, *callbacks],
            "default_root_dir": directory,
            **options,
        },
    )
    trainer.fit(Net() if model is None else model, loader(batch_size), ckpt_path=ckpt_path)
    return monitor, trainer


def rows(table: pa.Table, **where: Any) -> list[dict[str, Any]]:
    return [r for r in table.to_pylist() if all(r[name] == is_ for name, is_ in where.items())]


class TestRows:
    def test_formats_mixed(self, tmp_path: Path) -> None:
        layers = {"a": "fp8-delayed", "b": "fp8-rowwise", "c": "bf16"}
        run(tmp_path, "fp8-dynamic", layers)
        table = read_statistics(tmp_path)
        found = {(row["layer"], row["format"]) for row in table.to_pylist()}
        assert found == {("a", "fp8-delayed"), ("b", "fp8-rowwise")}
        assert set(table["operand"].to_pylist()) == {"input", "weight", "output", "grad_output"}
        assert set(table["step"].to_pylist()) == {8, 16}
        for row in table.to_pylist():
            assert row["sampled_steps"] == 2
            assert 20 < row["sqnr_db"] < 45
            assert row["nonfinite"] == 0
            assert row["amax"] > 0
            cast = row["operand"] != "output"
            assert (row["scale"] is not None) is cast
            assert (row["clamped_mass"] is not None) is cast
            if row["operand"] == "input":
                assert row["numel"] == 2 * 8 * 32

    @pytest.mark.parametrize("format", ["fp8-dynamic", "e4m3", "e8m3"])
    def test_every_kind_of_format(self, tmp_path: Path, format: str) -> None:
        run(tmp_path, format, max_steps=8)
        table = read_statistics(tmp_path)
        assert table.num_rows == 3 * 4
        scaled = rows(table, operand="input")[0]
        expected = 448 / scaled["amax"] if format == "fp8-dynamic" else 1
        assert scaled["scale"] == pytest.approx(expected, rel=1e-5)

    def test_a_single_spike_in_an_unsampled_step_is_seen(self, tmp_path: Path) -> None:
        monitor = ClampMonitor(every_n_steps=1000, log_every_n_steps=8, seed=3)
        run(tmp_path, model=Net(gain=8.0, spikes=range(11, 12)), monitor=monitor)
        first, second = (
            rows(read_statistics(tmp_path), step=step, layer="b", operand="input")[0]
            for step in (8, 16)
        )
        assert first["sampled_steps"] == second["sampled_steps"] == 0
        assert first["clamped_mass"] is second["sqnr_db"] is None
        assert first["headroom_bits"] > -1
        assert -4 < second["headroom_bits"] < -2.5  # 8x is 3 bits
        assert second["amax"] > 6 * first["amax"]

    def test_accumulated_micro_batches(self, tmp_path: Path) -> None:
        for directory, size, accumulate in (("one", 32, 1), ("four", 8, 4)):
            run(
                tmp_path / directory,
                "e4m3",
                model=Net(gain=2000.0),
                batch_size=size,
                accumulate_grad_batches=accumulate,
                max_steps=4,
                monitor=ClampMonitor(every_n_steps=4, sample=1, log_every_n_steps=4),
            )
        one, four = (read_statistics(tmp_path / name).to_pylist() for name in ("one", "four"))
        assert len(one) == len(four) == 12
        for a, b in zip(one, four, strict=True):
            assert (a["layer"], a["operand"]) == (b["layer"], b["operand"])
            for name in ("amax", "clamped_mass", "sqnr_db"):
                same = a[name] == b[name] or a[name] == pytest.approx(b[name], rel=2e-2)
                assert same, (a["layer"], a["operand"], name)

    def test_formats_that_flip_within_an_interval(self, tmp_path: Path) -> None:
        class Flip(L.Callback):
            def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
                if trainer.global_step in (5, 9):
                    format = {5: "fp8-rowwise", 9: "bf16"}[trainer.global_step]
                    trainer.precision_plugin.precision_map.set("b", format)

        monitor = ClampMonitor(every_n_steps=1, log_every_n_steps=16)
        run(tmp_path, monitor=monitor, callbacks=(Flip(),), max_steps=16)
        table = read_statistics(tmp_path)
        steps = {row["format"]: row["sampled_steps"] for row in rows(table, layer="b")}
        assert steps == {"fp8-delayed": 5, "fp8-rowwise": 4}
        assert {row["sampled_steps"] for row in rows(table, layer="a")} == {16}
        # What was watched of a layer before it left delayed scaling is not lost.
        left = rows(table, layer="b", format="fp8-delayed", operand="input")[0]
        assert left["headroom_bits"] is not None

    def test_what_other_scalings_would_have_done(self, tmp_path: Path) -> None:
        monitor = ClampMonitor(every_n_steps=2, log_every_n_steps=8, what_if=True)
        run(tmp_path, "fp8-dynamic", model=Net(gain=20.0, spikes=range(9, 16)), monitor=monitor)
        before, after = (
            rows(read_statistics(tmp_path), step=step, layer="b", operand="input")[0]
            for step in (8, 16)
        )
        assert before["what_if_delayed_clamped_mass"] < 0.05
        assert after["what_if_delayed_clamped_mass"] > before["what_if_delayed_clamped_mass"]
        assert after["clamped_mass"] == 0


class TestTraining:
    @pytest.mark.parametrize("scaling", ["fp8-delayed", "fp8-dynamic"])
    def test_is_what_it_is_without_a_monitor(self, tmp_path: Path, scaling: str) -> None:
        watched, alone = Net(), Net()
        run(tmp_path, scaling, model=watched, monitor=ClampMonitor(every_n_steps=2))
        make_trainer(FP8Precision(scaling), max_steps=16).fit(alone, loader())
        assert watched.losses == alone.losses
        assert same_weights(watched, alone)

    def test_layers_are_left_as_they_were(self, tmp_path: Path) -> None:
        model = Net()
        run(tmp_path, model=model)
        for layer in (model.a, model.b, model.c):
            assert isinstance(layer, FPLinear)
            assert not layer.collect
            assert layer.statistics is None

    def test_manual_optimization_without_loggers(self, tmp_path: Path) -> None:
        class Manual(Net):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch: list[Tensor], index: int) -> None:
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch[0]))
                    optimizer.step()

            def configure_optimizers(self) -> list[torch.optim.Optimizer]:
                return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.a, self.b)]

        _, trainer = run(tmp_path, model=Manual())
        assert trainer.global_step == 16
        table = read_statistics(tmp_path)
        assert set(table["operand"].to_pylist()) == {"input", "weight", "output", "grad_output"}
        assert trainer.progress_bar_metrics["fp8/share"] == 1

    def test_fast_dev_run_writes_nothing(self, tmp_path: Path) -> None:
        run(tmp_path, fast_dev_run=True)
        assert not list(tmp_path.iterdir())


class TestListeners:
    def test_each_sampled_step_by_itself(self, tmp_path: Path) -> None:
        monitor = ClampMonitor(every_n_steps=4, log_every_n_steps=8)
        heard: list[tuple[int, Tensor, list[str], list[LinearFormat]]] = []

        def listen(*sample: Any) -> None:
            heard.append(sample)
            if len(heard) == 2:
                monitor.sample_next()

        monitor.listeners.append(listen)
        run(tmp_path, monitor=monitor, accumulate_grad_batches=2, max_steps=16)
        steps = [step for step, *_ in heard]
        assert len(steps) == 5
        assert steps[2] == steps[1] + 1  # out of turn
        for _, values, names, formats in heard:
            assert names == ["a", "b", "c"]
            assert {format.name for format in formats} == {"fp8-delayed"}
            assert (values[:, 0, COLUMN["numel"]] == 2 * 8 * 32).all()
        table = read_statistics(tmp_path)
        # What listeners heard is what the rows were made of.
        for interval in (8, 16):
            sampled = [values for step, values, *_ in heard if interval - 8 < step <= interval]
            row = rows(table, step=interval, layer="b", operand="weight")[0]
            assert row["sampled_steps"] == len(sampled)
            at = [step for step in steps if interval - 8 < step <= interval]
            assert row["sampled_at"] == " ".join(map(str, at))
            assert row["numel"] == sum(values[1, 1, COLUMN["numel"]] for values in sampled)

    def test_are_kept_over_fits(self, tmp_path: Path) -> None:
        monitor = ClampMonitor(every_n_steps=4)
        steps: list[int] = []
        monitor.listeners.append(lambda step, *_: steps.append(step))
        for _ in range(2):
            run(tmp_path, monitor=monitor, max_steps=4)
        assert len(steps) == 2


class TestLoss:
    def test_mean_over_the_micro_batches(self, tmp_path: Path) -> None:
        """Of 26 batches four make a step, and the last two."""
        model = Net()
        options = {"accumulate_grad_batches": 4, "max_steps": -1, "max_epochs": 2}
        run(tmp_path, model=model, batch_size=10, **options)
        loss = read_loss(tmp_path)
        assert loss.steps.tolist() == list(range(1, 15))
        expected: list[float] = []
        for epoch in (model.losses[:26], model.losses[26:]):
            windows = [epoch[at : at + 4] for at in range(0, 26, 4)]
            expected += [sum(window) / len(window) for window in windows]
        assert loss.values.tolist() == pytest.approx(expected, rel=1e-6)

    def test_of_manual_optimization_and_dicts(self, tmp_path: Path) -> None:
        class Manual(Net):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch: list[Tensor], index: int) -> dict[str, Tensor]:
                loss = self.loss(batch[0])
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.losses.append(loss.item())
                return {"loss": loss}

        model = Manual()
        run(tmp_path, model=model, max_steps=5)
        assert read_loss(tmp_path).values.tolist() == pytest.approx(model.losses, rel=1e-6)

    def test_a_run_that_resumes_goes_on(self, tmp_path: Path) -> None:
        run(tmp_path / "whole", max_steps=12)
        first = Net()
        monitor = ClampMonitor(dirpath=tmp_path / "parts")
        _, trainer = run(tmp_path / "parts", monitor=monitor, model=first, max_steps=8)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        LossWriter(tmp_path / "parts").append([LossRow(step=9, loss=9.0)])  # to be replaced
        monitor = ClampMonitor(dirpath=tmp_path / "parts")
        half = tmp_path / "half.ckpt"
        run(tmp_path / "parts", monitor=monitor, max_steps=12, ckpt_path=half)
        loss = read_loss(tmp_path / "parts")
        assert loss.steps.tolist() == list(range(1, 13))
        assert loss.values[:8].tolist() == pytest.approx(first.losses, rel=1e-6)
        assert 9.0 not in loss.values

    def test_with_the_norm_of_the_gradient_if_somebody_tells(self, tmp_path: Path) -> None:
        monitor = ClampMonitor(every_n_steps=4, dirpath=tmp_path)

        class Norm(L.Callback):
            def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
                if trainer.global_step % 2:
                    norm = torch.tensor(float(trainer.global_step))
                    run_of(trainer).recorder.stepped(
                        OptimizerStep(grad_norm=norm, skipped=None, hyperparameters=[])
                    )

        run(tmp_path, monitor=monitor, callbacks=(Norm(),), max_steps=4)
        with (tmp_path / "loss.csv").open() as file:
            told = list(csv.DictReader(file))
        assert [row["grad_norm"] for row in told] == ["", "1.0", "", "3.0"]
        assert all(float(row["seconds"]) > 0 for row in told)


class TestLoggers:
    def test_csv_and_tensorboard(self, tmp_path: Path) -> None:
        """Also of values that are not finite: at first nothing at all is in FP8."""
        flip = L.Callback()
        flip.on_train_batch_end = lambda trainer, *_: (
            trainer.precision_plugin.precision_map.set("a", "fp8-dynamic")
            if trainer.global_step == 8
            else None
        )
        logs = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path, name="tb")]
        monitor = ClampMonitor(every_n_steps=4, log_every_n_steps=8, log_layers=["a", "?"])
        run(tmp_path, "bf16", monitor=monitor, logger=logs, callbacks=(flip,), max_steps=16)
        assert not monitor._log.failed
        with open(Path(logs[0].log_dir) / "metrics.csv") as file:
            found = list(csv.DictReader(file))
        names = NAMES | {
            f"fp8/{layer}/{operand}/{statistic}"
            for layer in "abc"
            for operand in ("input", "weight", "grad_output")
            for statistic in (
                *("amax", "headroom_bits", "nonfinite", "clamped_fraction", "clamped_mass"),
                *("underflow_fraction", "sqnr_db"),
            )
        }
        first, second = (row for row in found if row["step"] in ("8", "16"))
        assert names <= first.keys()
        assert first["fp8/sqnr_db/min"] == "nan"
        assert float(first["fp8/share"]) == 0
        assert float(second["fp8/share"]) == pytest.approx(1 / 3)
        assert 20 < float(second["fp8/sqnr_db/min"]) < 40
        assert float(second["fp8/a/input/clamped_mass"]) == 0
        assert math.isnan(float(second["fp8/b/input/amax"]))

        events = EventAccumulator(logs[1].log_dir).Reload()
        assert names <= set(events.Tags()["scalars"])
        assert [event.step for event in events.Scalars("fp8/share")] == [8, 16]
        # Rows are where the first logger writes.
        assert read_statistics(logs[0].log_dir).num_rows == 4

    def test_infinite_sqnr_is_capped(self, tmp_path: Path) -> None:
        class Exact(Net):
            def loss(self, x: Tensor) -> Tensor:
                with torch.no_grad():
                    self.a.weight.zero_()
                return self.a(torch.ones_like(x)).sum() * 0.0

        logger = CSVLogger(tmp_path)
        monitor = ClampMonitor(every_n_steps=1, log_every_n_steps=2, log_layers=["a"])
        run(tmp_path, model=Exact(), monitor=monitor, logger=logger, max_steps=2)
        with open(Path(logger.log_dir) / "metrics.csv") as file:
            row = list(csv.DictReader(file))[-1]
        assert float(row["fp8/a/input/sqnr_db"]) == 150
        assert read_statistics(logger.log_dir)["sqnr_db"][0].as_py() == math.inf

    def test_progress_bar(self, tmp_path: Path) -> None:
        _, trainer = run(tmp_path)
        assert trainer.progress_bar_metrics["fp8/share"] == 1
        assert "fp8/clamped_mass/max" in trainer.callback_metrics
        assert len(trainer.progress_bar_metrics) == 1  # more would break its line


class TestWarnings:
    def test_the_layer_that_clamps_comes_first(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Everywhere: in the rows, in the warnings, in the terminal."""
        run(tmp_path, DelayedScaling(1), None, Net(gain=50.0, spikes=range(1, 99, 2)),
            monitor=ClampMonitor(every_n_steps=1, log_every_n_steps=4))  # fmt: skip
        table = read_statistics(tmp_path)
        worst = max(rows(table, step=16), key=lambda row: row["clamped_mass"] or 0)
        assert (worst["layer"], worst["operand"]) == ("b", "input")
        assert worst["clamped_mass"] > 0.1

        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert warnings[0].startswith("layer b: input clamped mass ")
        assert "over 4 sampled steps under fp8-delayed" in warnings[0]
        assert "raise margin, or set layers={'b': 'fp8-dynamic'}" in warnings[0]
        # Four intervals: warned of the first, second and fourth time.
        assert sum("layer b: input clamped mass" in warning for warning in warnings) == 3

        capsys.readouterr()
        assert main(["stats", str(tmp_path)]) == 0
        output = capsys.readouterr().out
        first = output.split("Worst by clamped mass")[1].splitlines()[4]
        assert first.split()[:2] == ["b", "input"]

    def test_inf_at_an_unsampled_step(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        monitor = ClampMonitor(every_n_steps=1000, log_every_n_steps=8, seed=3)
        run(tmp_path, model=Net(gain=math.inf, spikes=range(15, 16)), monitor=monitor)
        last = rows(read_statistics(tmp_path), step=16, layer="b", operand="input")[0]
        assert last["nonfinite"] == 8 * 32
        assert math.isfinite(last["amax"])
        assert "layer b: input has 256 inf or NaN elements under fp8-delayed" in caplog.text

    def test_off(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        monitor = ClampMonitor(
            1, log_every_n_steps=4, warn_clamped_mass=None, warn_underflow=None, warn_nonfinite=None
        )
        run(tmp_path, "e4m3", model=Net(gain=5000.0), monitor=monitor)
        assert "layer b" not in caplog.text


class TestFailures:
    @pytest.mark.parametrize("what", ["append", "flush"])
    def test_of_telemetry_do_not_end_the_run(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        what: str,
    ) -> None:
        def fail(*_: Any) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(StatisticsWriter, what, fail)
        model = Net()
        run(tmp_path, model=model, max_steps=32)
        assert len(model.losses) == 32
        assert caplog.text.count("ClampMonitor failed") == 1
        assert "disk full" in caplog.text
        assert not model.a.collect

    def test_of_the_run_lose_no_rows(self, tmp_path: Path) -> None:
        class Breaks(Net):
            def training_step(self, batch: list[Tensor], index: int) -> Tensor:
                if self.global_step == 13:
                    raise RuntimeError("out of memory")
                return super().training_step(batch, index)

        with pytest.raises(RuntimeError, match="out of memory"):
            run(tmp_path, model=Breaks())
        assert set(read_statistics(tmp_path)["step"].to_pylist()) == {8, 13}


class TestResume:
    def test_goes_on_where_the_checkpoint_was(self, tmp_path: Path) -> None:
        class Save(L.Callback):
            def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
                if trainer.current_epoch == 0:
                    trainer.save_checkpoint(tmp_path / "middle.ckpt")

        def train(name: str, epochs: int, **options: Any) -> list[dict[str, Any]]:
            monitor = ClampMonitor(every_n_steps=16, log_every_n_steps=8)
            run(tmp_path / name, monitor=monitor, max_epochs=epochs, max_steps=-1, **options)
            return read_statistics(tmp_path / name).to_pylist()

        whole = train("whole", 2, callbacks=(Save(),))
        assert torch.load(tmp_path / "middle.ckpt", weights_only=True)["global_step"] == 32
        train("resumed", 2)  # an abandoned future
        resumed = train("resumed", 2, ckpt_path=tmp_path / "middle.ckpt")
        assert {row["step"] for row in resumed} == set(range(8, 65, 8))
        for one, other in zip(whole, resumed, strict=True):
            assert one == pytest.approx(other, nan_ok=True)


class TestRefusals:
    def test_no_plugin_of_this_package(self, tmp_path: Path) -> None:
        trainer = make_trainer(None, callbacks=[ClampMonitor()], default_root_dir=tmp_path)
        with pytest.raises(
            ValueError, match="needs a precision plugin of lightning_fp, got Precision"
        ):
            trainer.fit(Net(), loader())

    def test_a_glob_that_matches_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"'blocks\.\*' matches no linear layer"):
            run(tmp_path, monitor=ClampMonitor(log_layers=["blocks.*"]))

    @pytest.mark.parametrize(
        "options", [{"every_n_steps": 0}, {"sample": 0}, {"log_every_n_steps": 0}]
    )
    def test_numbers_below_one(self, options: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least 1, got 0"):
            ClampMonitor(**options)

    def test_globs_in_one_string(self) -> None:
        with pytest.raises(ValueError, match="log_layers must be a list of texts, got 'blocks"):
            ClampMonitor(log_layers="blocks.*")
