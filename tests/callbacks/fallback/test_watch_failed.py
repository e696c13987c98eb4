"""A watch that has failed says so: in the events, in the bar, in the report, at the end."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from rich.console import Console

from lightning_fp import DivergenceDetector, FP8Precision, PrecisionFallback
from lightning_fp.events import WatchFailed
from lightning_fp.records import read_events
from lightning_fp.report.terminal import terminal_summary
from tests.callbacks.fallback.test_rehearsal import Global, HiddenTeacher, Net, rows
from tests.helper import make_trainer


@dataclass(frozen=True, kw_only=True)
class Broken(DivergenceDetector):
    """Raises at its fifth step."""

    def step(self, state: Any, **signals: Any) -> Any:
        if state.loss.seen == 4:
            raise RuntimeError("a defect of ours")
        return super().step(state, **signals)


class Bar(TQDMProgressBar):
    """Remembers what it would show."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.words.append(self.get_metrics(trainer, pl_module).get("watch"))

    on_train_start = on_train_epoch_start = on_train_epoch_end = on_train_end = lambda *_: None


def run(model: Net, directory: Path, fallback: PrecisionFallback) -> list[Any]:
    bar = Bar()
    trainer = make_trainer(
        FP8Precision("dynamic", base="32-true", layers={"*": "fp8-dynamic"}),
        max_steps=10,
        enable_progress_bar=True,
        callbacks=[bar, fallback],
    )
    trainer.fit(model, rows())
    assert "get_metrics" not in vars(bar)
    return bar.words


def summary(directory: Path) -> str:
    console = Console(width=200, file=io.StringIO())
    terminal_summary([directory], console)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_it_is_said_everywhere(tmp_path: Path) -> None:
    fallback = PrecisionFallback(Broken(), dirpath=tmp_path)
    words = run(Net(), tmp_path, fallback)
    [event] = read_events(tmp_path, kinds=["watch_failed"])
    assert isinstance(event, WatchFailed)
    assert "a defect of ours" in event.reason
    assert "the watch has failed; the run continues unprotected" in event.sentence()
    assert 4 <= event.step <= 6
    assert words[: event.step] == [None] * event.step
    assert set(words[event.step :]) == {f"failed at step {event.step}"}
    assert f"The watch failed: the run was unprotected from step {event.step}." in summary(tmp_path)
    assert "Nothing went wrong" not in summary(tmp_path)
    last = read_events(tmp_path)[-1]
    assert last.reason.endswith(f"the run was unprotected from step {event.step}")


@pytest.mark.parametrize(
    ("model", "word", "sentence"),
    [
        (Global, "limits only", "the watch was confined to limits"),
        (HiddenTeacher, "one step", "the watch was confined to single steps"),
        (Net, None, ""),
    ],
)
def test_so_does_one_that_confines_itself(
    model: type[Net], word: str | None, sentence: str, tmp_path: Path
) -> None:
    words = run(model(), tmp_path, PrecisionFallback(dirpath=tmp_path))
    assert words[:3] == [None] * 3
    assert set(words[3:]) == {word}
    assert sentence in summary(tmp_path)
    assert ("confined" in summary(tmp_path)) == (word is not None)
