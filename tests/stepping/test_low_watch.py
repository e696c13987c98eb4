"""A run that asks for FP8 and never has it says so, in its last line."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning as L
import pytest

from lightning_fp import ClampMonitor, FP8Precision, FP16Precision, StagedRollout
from tests.helper import LanguageModel, make_trainer, text_loader

FIRST = "FP8 was asked for but never on: all 4 layers stayed in high precision in every step"


class WithoutFP8(L.Callback):
    """Puts all layers into bf16 before the first step, and perhaps back before another."""

    def __init__(self, back_at: int | None = None) -> None:
        self.back_at = back_at

    def on_train_start(self, trainer: L.Trainer, *_: object) -> None:
        trainer.precision_plugin.precision_map.set("*", "bf16", reason="I know better")

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.back_at:
            trainer.precision_plugin.precision_map.set("*fc1", "fp8-dynamic")


def last_line(caplog: pytest.LogCaptureFixture, *callbacks: L.Callback, plugin=None) -> str:
    caplog.clear()
    trainer = make_trainer(
        plugin or FP8Precision("delayed"), max_steps=4, callbacks=list(callbacks)
    )
    with caplog.at_level(logging.INFO):
        trainer.fit(LanguageModel(blocks=1), text_loader(40))
    return caplog.messages[-1]


def test_what_a_rollout_never_came_to(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    said = last_line(caplog, ClampMonitor(dirpath=tmp_path), StagedRollout("aggressive"))
    assert said == (
        f"{FIRST} (rollout stage high: the rollout begins); the run ended before its recipe got"
        " there: train longer, or shorten the recipe"
    )


def test_what_a_user_has_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    assert last_line(caplog, WithoutFP8()).startswith(f"{FIRST} (I know better); give")
    assert "never on" not in last_line(caplog, WithoutFP8(back_at=2))
    assert "never on" not in last_line(caplog)


def test_who_asks_for_no_low_precision_hears_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert "never on" not in last_line(caplog, plugin=FP16Precision())
    high = FP8Precision(layers={"*": "bf16"})
    assert "never on" not in last_line(caplog, plugin=high)


def test_evaluation_alone_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(FP8Precision())
    with caplog.at_level(logging.INFO):
        trainer.validate(LanguageModel(blocks=1), text_loader(8), verbose=False)
    assert "never on" not in caplog.text
