"""Whoever writes to the table, the run's log has one event of it, and the report shows it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_fp import ClampMonitor, FP8Precision, RolloutRecipe, Stage, StagedRollout
from lightning_fp.callbacks import LossRecorder
from lightning_fp.layers import AutoScaling
from lightning_fp.layers.histories.auto_scaling import AutoScalingState
from lightning_fp.records import FormatChange, read_events
from lightning_fp.report.read.format_history import format_histories
from lightning_fp.report.read.run_records import read_records
from tests.helper import LanguageModel, fit, make_trainer, text_loader

FC1 = "model.blocks.1.fc1"


def changes(directory: Path) -> list[FormatChange]:
    return [e for e in read_events(directory) if isinstance(e, FormatChange)]


class Sets(L.Callback):
    """A user who writes to the table in some hook, at given steps."""

    def __init__(self, formats: dict[int, str], hook: str = "on_train_batch_end") -> None:
        self.formats, self.seen = formats, Counter[tuple[int, str]]()
        setattr(self, hook, self.write)

    def write(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step in self.formats:
            table = trainer.precision_plugin.precision_map
            table.set(FC1, self.formats.pop(step), reason="I want it")

    def on_before_backward(self, trainer: L.Trainer, module: Any, loss: Any) -> None:
        self.seen[trainer.global_step, module.get_submodule(FC1).format.name] += 1


def test_a_users_write_beside_a_monitor_alone(tmp_path: Path) -> None:
    sets = Sets({4: "bf16", 9: "fp8-rowwise"})
    monitor = ClampMonitor(dirpath=tmp_path)
    fit(FP8Precision(), max_steps=12, callbacks=[monitor, sets])
    assert [(e.step, e.reason, dict(e.formats)) for e in changes(tmp_path)] == [
        (4, "I want it", {FC1: ("fp8-dynamic", "bf16")}),
        (9, "I want it", {FC1: ("bf16", "fp8-rowwise")}),
    ]
    histories = format_histories(read_records(tmp_path))
    assert histories[FC1] == ((0, "fp8-dynamic"), (4, "bf16"), (9, "fp8-rowwise"))
    assert histories["model.blocks.0.fc1"] == ((0, "fp8-dynamic"),)


def test_a_move_of_fp8_auto_beside_a_monitor_alone(tmp_path: Path) -> None:
    plugin = FP8Precision("auto", tokens=1e9)
    quick = AutoScaling(tokens=1e9, window=1, check_every=1, clamp_bits=20)
    plugin.precision_map._histories._auto = AutoScalingState(quick)
    fit(plugin, max_steps=20, callbacks=[ClampMonitor(dirpath=tmp_path)])
    moved = [(e.step, layer) for e in changes(tmp_path) for layer in e.formats]
    assert moved
    assert len(moved) == len(plugin.precision_map.changes)
    histories = format_histories(read_records(tmp_path))
    for step, layer in moved:
        assert (step, "fp8-delayed") in histories[layer]
    assert {c.author for c in plugin.precision_map.changes} == {"auto"}


def test_a_rollouts_write_beside_a_monitor(tmp_path: Path) -> None:
    recipe = RolloutRecipe(
        name="two",
        stages=(
            Stage(name="high", layers={"*": "high"}, until={"steps": 4}),
            Stage(name="low", layers={"*": "configured"}),
        ),
    )
    callbacks = [ClampMonitor(dirpath=tmp_path), StagedRollout(recipe)]
    fit(FP8Precision(), max_steps=8, callbacks=callbacks)
    first, second = changes(tmp_path)
    assert (first.step, second.step) == (0, 4)
    assert first.formats.keys() == second.formats.keys()
    assert len(first.formats) == 8
    assert second.reason.startswith("rollout stage low: ")
    kinds = [event.kind for event in read_events(tmp_path)]
    assert kinds == ["stage", "format", "stage", "format"]
    assert format_histories(read_records(tmp_path))[FC1] == ((0, "bf16"), (4, "fp8-dynamic"))


def test_every_directory_of_a_run_has_the_event(tmp_path: Path) -> None:
    callbacks = [ClampMonitor(dirpath=tmp_path / "a"), LossRecorder(tmp_path / "b")]
    fit(FP8Precision(), max_steps=4, callbacks=[*callbacks, Sets({2: "bf16"})])
    for name in ("a", "b"):
        assert [(e.step, e.layers) for e in changes(tmp_path / name)] == [(2, (FC1,))]


def test_a_fit_that_fails_hears_nothing_afterwards(tmp_path: Path) -> None:
    class Crash(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            raise RuntimeError("power cut")

    plugin, model = FP8Precision(), LanguageModel()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(plugin, model, max_steps=4, callbacks=[LossRecorder(tmp_path / "one"), Crash()])
    sets = Sets({2: "bf16"})
    fit(plugin, model, max_steps=4, callbacks=[LossRecorder(tmp_path / "two"), sets])
    assert not (tmp_path / "one" / "events.jsonl").exists()
    assert len(changes(tmp_path / "two")) == 1


def test_a_resume_makes_events_void_beside_a_monitor_alone(tmp_path: Path) -> None:
    """A write that waits in the checkpoint is told by the run that goes on, once."""
    path = tmp_path / "4.ckpt"

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(path)

    def run(ckpt: Path | None, formats: dict[int, str]) -> None:
        callbacks = [ClampMonitor(dirpath=tmp_path), Sets(formats), Save()]
        trainer = make_trainer(FP8Precision(), max_steps=8, callbacks=callbacks)
        trainer.fit(LanguageModel(), text_loader(), ckpt_path=ckpt)

    run(None, {2: "fp8-rowwise", 4: "bf16", 6: "fp8-dynamic"})
    assert [e.step for e in changes(tmp_path)] == [2, 4, 6]
    run(path, {})
    assert [e.step for e in changes(tmp_path)] == [2, 4]
    assert torch.load(path, weights_only=True)["lightning_fp.run"]["ClampMonitor"] > 0


@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_after_backward", "on_before_optimizer_step"]
)
def test_each_step_has_one_boundary(hook: str, tmp_path: Path) -> None:
    """Whenever a write is made, all micro-batches of a step run in the same formats."""
    plugin = FP8Precision()
    told: list[int] = []
    sets = Sets({step: ("bf16", "fp8-dynamic")[step % 2] for step in range(1, 8)}, hook)
    options: dict[str, Any] = {"max_steps": 8, "accumulate_grad_batches": 3}
    trainer = make_trainer(plugin, callbacks=[sets, LossRecorder(tmp_path)], **options)
    plugin.precision_map.subscribe(lambda _: told.append(trainer.global_step))
    boundaries: list[int] = []
    boundary = plugin.boundary
    plugin.boundary = lambda: boundaries.append(trainer.global_step) or boundary()
    trainer.fit(LanguageModel(), text_loader())
    assert sorted(sets.seen.values()) == [3] * 8
    assert len(told) == len(set(told)) >= 5
    assert boundaries == list(range(8))
    assert [e.step for e in changes(tmp_path)] == told
