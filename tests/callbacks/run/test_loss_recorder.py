"""LossRecorder: the loss, the norm and the time of every step, whatever the precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lightning_fp import FP8Precision, FP16Precision, LossScaling
from lightning_fp.callbacks import ClampMonitor, LossRecorder, PrecisionFallback
from lightning_fp.records import read_baseline, read_run, read_steps
from tests.helper import LanguageModel, fit, make_trainer, next_byte_loss, text_loader


class Watch(L.Callback):
    """The norm of all gradients before clipping, as a test sees it."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        self.norms.append(torch.cat(gradients).norm().item())


@pytest.mark.parametrize(
    "plugin",
    [None, MixedPrecision("bf16-mixed", "cpu"), FP8Precision()],
    ids=["none", "bf16-mixed", "fp8"],
)
def test_a_row_for_every_step(tmp_path: Path, plugin: Any) -> None:
    watch = Watch()
    model = fit(
        plugin,
        max_steps=7,
        accumulate_grad_batches=2,
        log_every_n_steps=3,
        gradient_clip_val=0.1,
        callbacks=[watch, LossRecorder(tmp_path)],
    )
    table = read_steps(tmp_path)
    assert table["step"].to_pylist() == list(range(1, 8))
    means = [(a + b) / 2 for a, b in zip(model.losses[::2], model.losses[1::2], strict=True)]
    assert table["loss"].to_pylist() == pytest.approx(means, rel=1e-6)
    assert table["grad_norm"].to_pylist() == pytest.approx(watch.norms, rel=1e-5)
    assert min(watch.norms) > 0.1
    assert min(table["seconds"].to_pylist()) > 0
    assert read_baseline(tmp_path).steps == 7
    (run,) = read_run(tmp_path)
    assert run.parameters == sum(p.numel() for p in model.parameters())


def test_norms_are_unscaled(tmp_path: Path) -> None:
    """FP16 scales the loss by 2^10 here; also a fused optimizer, which unscales by itself."""
    norms = []
    for scaler, fused in ((None, False), (True, False), (True, True)):
        directory = tmp_path / f"{scaler}-{fused}"

        class Model(LanguageModel):
            fused = False

            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=self.fused)

        model = Model()
        model.fused = fused
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaler else None
        plugin = None if scaler is None else MixedPrecision("16-mixed", "cpu", scaler)
        fit(plugin, model, max_steps=2, callbacks=[LossRecorder(directory)])
        norms.append(read_steps(directory)["grad_norm"].to_pylist())
    own = FP16Precision(loss_scaling=LossScaling(init_scale=2.0**10))
    fit(own, max_steps=2, callbacks=[LossRecorder(tmp_path / "own")])
    norms.append(read_steps(tmp_path / "own")["grad_norm"].to_pylist())
    for each in norms[1:]:
        assert each == pytest.approx(norms[0], rel=2e-2)


class Manual(LanguageModel):
    """Two optimizers, one for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        head = list(self.model.lm_head.parameters())
        rest = [p for name, p in self.named_parameters() if "lm_head" not in name]
        return [torch.optim.SGD(part, lr=0.1) for part in (head, rest)]

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = next_byte_loss(self, batch)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        self.losses.append(loss.item())
        return loss


def test_several_optimizers(tmp_path: Path) -> None:
    watch = Watch()
    model = fit(None, Manual(), max_steps=6, callbacks=[watch, LossRecorder(tmp_path)])
    table = read_steps(tmp_path)
    assert table["loss"].to_pylist() == pytest.approx(model.losses, rel=1e-6)
    # Each optimizer's hook shows the test all gradients.
    assert table["grad_norm"].to_pylist() == pytest.approx(watch.norms[::2], rel=1e-5)


@pytest.mark.parametrize("fallback", [False, True])
def test_beside_a_monitor_each_step_has_one_row(tmp_path: Path, fallback: bool) -> None:
    watch = Watch()
    others: list[L.Callback] = [PrecisionFallback()] if fallback else []
    callbacks = [watch, LossRecorder(tmp_path), ClampMonitor(log_every_n_steps=4), *others]
    fit(FP8Precision(), max_steps=8, callbacks=callbacks)
    lines = (tmp_path / "loss.csv").read_text().splitlines()
    assert len(lines) == 1 + 8
    norms = read_steps(tmp_path)["grad_norm"].to_pylist()
    assert norms == pytest.approx(watch.norms, rel=1e-5)
    assert len(read_run(tmp_path)) == 1


def test_a_crashed_run_has_its_rows(tmp_path: Path) -> None:
    class Crash(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if trainer.global_step == 5:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(None, max_steps=8, callbacks=[LossRecorder(tmp_path), Crash()])
    assert read_steps(tmp_path)["step"].to_pylist() == [1, 2, 3, 4, 5]


def test_a_full_disk_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("lightning_fp.records.loss.LossWriter.append", full)
    model = fit(None, max_steps=6, log_every_n_steps=2, callbacks=[LossRecorder(tmp_path)])
    assert len(model.losses) == 6
    assert caplog.text.count("losses cannot be written") == 1


def test_a_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    recorder = LossRecorder()
    trainer = make_trainer(None, callbacks=[recorder], fast_dev_run=True, default_root_dir=tmp_path)
    trainer.fit(LanguageModel(), text_loader(16))
    assert list(tmp_path.iterdir()) == []
