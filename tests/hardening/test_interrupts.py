"""Ctrl-C anywhere: the run ends as plain Lightning ends it, its records and layers are whole."""

from __future__ import annotations

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
from lightning_fp.loop import PrecisionLoop
from lightning_fp.recipes import RolloutRecipe, Stage
from lightning_fp.records import read_events, read_statistics, read_steps
from lightning_fp.report import read_records
from tests.helper import LanguageModel, make_trainer, same_weights, text_loader, text_rows

HOOKS = (
    "setup",
    "on_fit_start",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_save_checkpoint",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "teardown",
)
EACH_STEP = {hook for hook in HOOKS if "batch" in hook or "before" in hook or "after" in hook}
RECIPE = RolloutRecipe(
    name="two",
    stages=(
        Stage(name="high", layers={"*": "high"}, until={"steps": 1}),
        Stage(name="low", layers={"*": "configured"}),
    ),
)


def interrupter(hook: str, steps: int) -> L.Callback:
    """Raises in one hook, in hooks of a step not before so many steps."""

    def stop(self: L.Callback, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        if hook not in EACH_STEP or "validation" in hook or trainer.global_step >= steps:
            raise KeyboardInterrupt

    return type("Interrupter", (L.Callback,), {hook: stop})()


class Validated(LanguageModel):
    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        self.log("val_loss", self.val_losses[-1])


def ours(directory: Path) -> list[L.Callback]:
    return [
        ClampMonitor(every_n_steps=1, log_every_n_steps=2, dirpath=directory),
        PrecisionFallback(dirpath=directory),
        StagedRollout(RECIPE, dirpath=directory),
        ParityProbe(every_n_steps=2, dirpath=directory),
        EvaluationGap(dirpath=directory),
        StabilityMonitor(dirpath=directory),
        LossRecorder(directory),
    ]


def interrupted(trainer: L.Trainer, model: L.LightningModule) -> tuple[str, str, int, bool]:
    """How a fit ended: with what, in which state, after how many steps, training or not."""
    raised = ""
    try:
        trainer.fit(model, text_loader(24), text_loader(8))
    except BaseException as error:
        raised = type(error).__name__
    return raised, str(trainer.state.status), trainer.global_step, model.training


def trainer_of(plugin: Any, callbacks: list[L.Callback], directory: Path) -> L.Trainer:
    return make_trainer(
        plugin,
        callbacks=callbacks,
        max_epochs=1,
        max_steps=6,
        val_check_interval=3,
        num_sanity_val_steps=1,
        limit_val_batches=1,
        enable_checkpointing=True,
        log_every_n_steps=2,
        default_root_dir=directory,
    )


@pytest.mark.parametrize(
    "place", [pytest.param("before ours", marks=pytest.mark.slow), "after ours"]
)
@pytest.mark.parametrize("hook", HOOKS)
def test_in_every_hook(hook: str, place: str, tmp_path: Path) -> None:
    plain = interrupted(
        trainer_of(None, [interrupter(hook, 3)], tmp_path / "plain"), Validated(blocks=1)
    )
    directory, plugin, model = tmp_path / "run", FP8Precision("delayed"), Validated(blocks=1)
    callbacks, stop = ours(directory), interrupter(hook, 3)
    callbacks = [stop, *callbacks] if place == "before ours" else [*callbacks, stop]
    trainer = trainer_of(plugin, callbacks, tmp_path / "ours")
    found = interrupted(trainer, model)
    assert found == plain
    assert plain[0], "the hook was called"

    # What was written is whole: a row for every step that ended.
    ended = trainer.global_step - (hook in ("on_before_zero_grad", "on_train_batch_end"))
    if directory.exists():
        read_records(directory)
        steps = read_steps(directory)["step"].to_pylist()
        assert steps == list(range(1, len(steps) + 1))
        assert ended <= len(steps) <= trainer.global_step
    if (directory / "events.jsonl").exists():
        assert read_events(directory)

    # The layers are as the table says, and evaluate in high precision.
    table = plugin.precision_map
    assert not table.frozen
    assert {name: layer.format.name for name, layer in table.layers.items()} == table.formats()
    batch = text_rows(4)[:, :-1]
    twin = LanguageModel(blocks=1)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(batch), twin.eval()(batch))

    # And another fit of the same model is no different from any other.
    more = [ClampMonitor(dirpath=tmp_path / "again", log_every_n_steps=1)]
    again = make_trainer(FP8Precision("delayed"), callbacks=more, max_steps=2)
    again.fit(model.train(), text_loader(8))
    assert again.global_step == 2
    assert read_steps(tmp_path / "again")["step"].to_pylist() == [1, 2]
    assert read_statistics(tmp_path / "again").num_rows > 0


CALLS: list[int] = []
"""Of `training_step`; not of the module's, whose attributes a replay puts back."""


class Stopped(LanguageModel):
    """Is interrupted in a call of `training_step`, in a training step or in a replay."""

    def __init__(self, at: int | None) -> None:
        super().__init__(blocks=1)
        self.at = at
        CALLS.clear()

    def training_step(self, batch: Any, index: int) -> Any:
        CALLS.append(index)
        if len(CALLS) == self.at:
            raise KeyboardInterrupt
        return super().training_step(batch, index)


def end_of(model: L.LightningModule, callbacks: list[L.Callback], steps: int) -> L.Trainer:
    trainer = make_trainer(FP8Precision(), callbacks=callbacks, max_steps=steps)
    try:
        trainer.fit(model, text_loader(80))
    except SystemExit:
        assert model.at is not None
    return trainer


@pytest.mark.parametrize("at", range(1, 41, 9))
def test_in_the_middle_of_a_replay(at: int, tmp_path: Path) -> None:
    """The weights are those of the steps that were made, whatever a replay was trying."""
    model = Stopped(at)
    trainer = end_of(model, [PrecisionFallback(dirpath=tmp_path)], 20)
    twin = Stopped(None)
    end_of(twin, [], max(1, trainer.global_step))
    if trainer.global_step:
        assert same_weights(model, twin)
    read_records(tmp_path)


def test_replays_are_interrupted_as_well(tmp_path: Path) -> None:
    """The test above reaches into the rehearsal: there are more calls than steps."""
    trainer = end_of(Stopped(None), [PrecisionFallback(dirpath=tmp_path)], 20)
    assert len(CALLS) >= trainer.global_step + 13


def test_in_a_plain_loop(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    own = PrecisionLoop(model, optimizer, "delayed", dirpath=tmp_path, progress=False)
    calls = 0

    def loss(batch: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return model(batch).square().mean()

    def train() -> None:
        with own:
            for _ in range(9):
                own.step(loss, torch.ones(4, 16))

    with pytest.raises(KeyboardInterrupt):
        train()
    done = own.global_step
    assert read_steps(tmp_path)["step"].to_pylist() == list(range(1, done + 1))
    assert not own.precision_map.frozen
    read_records(tmp_path)
