"""What a table notes of layers is in the run's events, from a Trainer and from a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_fp import ClampMonitor, FP8Precision
from lightning_fp.events import Note
from lightning_fp.loop import PrecisionLoop
from lightning_fp.records import read_events
from tests.helper import LanguageModel, TinyGPT, fit, next_byte_loss, text_rows

TEXT = "FSDP2 gathers weights as they are"


class Notes(L.Callback):
    """As FSDP2's gathers do, in the middle of a forward."""

    def on_before_zero_grad(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            trainer.precision_plugin.precision_map._note(TEXT)


def noted(directory: Path) -> list[tuple[int, str]]:
    events = [event for event in read_events(directory) if isinstance(event, Note)]
    return [(event.step, event.reason) for event in events if event.reason == TEXT]


def test_in_a_trainer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = ClampMonitor(dirpath=tmp_path)
    fit(FP8Precision(), LanguageModel(), max_steps=3, callbacks=[monitor, Notes()])
    assert noted(tmp_path) == [(1, TEXT)]
    assert sum(TEXT in record.getMessage() for record in caplog.records) == 1


def test_in_a_plain_loop(tmp_path: Path) -> None:
    model = TinyGPT()
    optimizer = torch.optim.AdamW(model.parameters())
    loop = PrecisionLoop(model, optimizer, "fp8-dynamic", monitor={}, dirpath=tmp_path)
    for batch in text_rows(8).split(4):
        loop.step(lambda rows: next_byte_loss(model, rows), batch)
        loop.precision_map._note(TEXT)
    assert [reason for _, reason in noted(tmp_path)] == [TEXT, TEXT]


def test_without_records_the_log_has_it(caplog: pytest.LogCaptureFixture) -> None:
    plugin = FP8Precision()
    plugin.precision_map._note(TEXT)
    assert TEXT in caplog.text
