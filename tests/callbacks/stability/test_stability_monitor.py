"""StabilityMonitor: the hooks around what the log measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_fp import FP8Precision, PrecisionFallback, StabilityMonitor
from lightning_fp.callbacks.run.run import run_of
from lightning_fp.records import read_loss, read_stability
from lightning_fp.telemetry.stability.signals import NAMES, PUBLISHED
from tests.helper import LanguageModel, make_trainer, same_weights, text_loader

STEPS = 25


def fitted(plugin: Any, *callbacks: L.Callback, **options: Any) -> tuple[L.Trainer, LanguageModel]:
    torch.manual_seed(0)
    module = LanguageModel()
    trainer = make_trainer(
        plugin, callbacks=list(callbacks), max_steps=STEPS, log_every_n_steps=10, **options
    )
    trainer.fit(module, text_loader())
    return trainer, module


@pytest.mark.parametrize("plugin", [None, FP8Precision])
def test_every_step_has_a_row_with_any_precision(plugin: Any, tmp_path: Path) -> None:
    made = None if plugin is None else plugin()
    trainer, _ = fitted(made, StabilityMonitor(dirpath=tmp_path))
    table = read_stability(tmp_path).to_pydict()
    assert table["step"] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "lr", *NAMES):
        missing = sum(value is None for value in table[name])
        assert missing == (name == "gradient_noise"), name
    assert table["loss"] == pytest.approx(read_loss(tmp_path).values.tolist(), rel=1e-5)
    run = run_of(trainer)
    assert all(run.board.latest(name) is not None for name in PUBLISHED)


def test_the_run_is_the_same_bit_for_bit_and_its_model_left_alone(tmp_path: Path) -> None:
    _, plain = fitted(FP8Precision("delayed"))
    trainer, watched = fitted(FP8Precision("delayed"), StabilityMonitor(dirpath=tmp_path))
    assert same_weights(plain, watched)
    for module in watched.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    optimizer: Any = trainer.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert torch.overrides._get_current_function_mode() is None


def test_micro_batches_are_one_step(tmp_path: Path) -> None:
    fitted(FP8Precision(), StabilityMonitor(dirpath=tmp_path), accumulate_grad_batches=2)
    table = read_stability(tmp_path).to_pydict()
    assert table["step"] == list(range(1, STEPS + 1))
    assert None not in table["attention_logit_max"]


def test_replays_leave_no_trace(tmp_path: Path) -> None:
    """The rehearsal replays the first steps; the table has what it has without."""
    fitted(FP8Precision(), StabilityMonitor(dirpath=tmp_path / "alone"))
    with_fallback = tmp_path / "watched"
    fitted(
        FP8Precision(),
        PrecisionFallback(dirpath=with_fallback),
        StabilityMonitor(dirpath=with_fallback),
    )
    one, other = (read_stability(each).to_pydict() for each in (tmp_path / "alone", with_fallback))
    for name in NAMES:
        assert one[name][1:] == pytest.approx(other[name][1:], rel=1e-6), name


def test_a_run_that_breaks_off_has_its_rows_and_no_mode(tmp_path: Path) -> None:
    class Breaks(LanguageModel):
        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            if self.global_step == 12:
                raise KeyError("broken")
            return super().training_step(batch, index)

    trainer = make_trainer(
        FP8Precision(), callbacks=[StabilityMonitor(dirpath=tmp_path)], max_steps=STEPS
    )
    with pytest.raises(KeyError, match="broken"):
        trainer.fit(Breaks(), text_loader())
    assert read_stability(tmp_path).to_pydict()["step"] == list(range(1, 13))
    assert torch.overrides._get_current_function_mode() is None


def test_a_resumed_run_goes_on_in_the_same_table(tmp_path: Path) -> None:
    fitted(FP8Precision(), StabilityMonitor(dirpath=tmp_path / "whole"))
    torch.manual_seed(0)
    module = LanguageModel()
    first = make_trainer(
        FP8Precision(), callbacks=[StabilityMonitor(dirpath=tmp_path / "parts")], max_steps=12
    )
    first.fit(module, text_loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    second = make_trainer(
        FP8Precision(), callbacks=[StabilityMonitor(dirpath=tmp_path / "parts")], max_steps=STEPS
    )
    second.fit(LanguageModel(), text_loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    table = read_stability(tmp_path / "parts").to_pydict()
    assert table["step"] == list(range(1, STEPS + 1))


def test_options_are_refused_and_a_head_is_looked_for() -> None:
    with pytest.raises(ValueError, match="log_every_n_steps must be at least 1, got 0"):
        StabilityMonitor(log_every_n_steps=0)
    with pytest.raises(ValueError, match=r"head must be the name of a module, got 'nowhere'"):
        fitted(FP8Precision(), StabilityMonitor("nowhere"))
