"""A fallback over a model in high precision leaves no trace until there is something to tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_fp import FP8Precision, PrecisionFallback, Stage, StagedRollout
from lightning_fp.recipes import RolloutRecipe
from lightning_fp.records import read_events

CALLS: list[int] = []
"""Not in the module, whose attributes a replay puts back."""


class Model(L.LightningModule):
    def __init__(self, linear: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 16) if linear else nn.Conv1d(32, 16, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        CALLS.append(batch_idx)
        x = batch if isinstance(self.layer, nn.Linear) else batch[..., None]
        return self.layer(x).float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Stepper(self.parameters(), lr=0.01)


class Stepper(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        CALLS.append(-1)
        return super().step(closure)


class Switch(L.Callback):
    """A layer gets another format at a step; by default it stays there."""

    def __init__(self, back_at: int = -1) -> None:
        self.formats = {3: "fp8-dynamic", back_at: "high"}

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if (format := self.formats.get(trainer.global_step)) is not None:
            trainer.precision_plugin.precision_map.set("layer", format, reason="by hand")


def run(
    tmp_path: Path,
    *callbacks: L.Callback,
    linear: bool = True,
    plain: bool = False,
    format: str = "high",
    resume: Path | None = None,
    steps: int = 10,
    **options: Any,
) -> L.Trainer:
    torch.manual_seed(0)
    CALLS.clear()
    model = Model(linear)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **options,
        plugins=None if plain else FP8Precision(format, base="32-true"),
        callbacks=[*([] if plain else [PrecisionFallback()]), *callbacks],
    )
    loader = torch.utils.data.DataLoader(torch.randn(80, 32), batch_size=8)
    trainer.fit(model, loader, ckpt_path=resume)
    return trainer


def saved(trainer: L.Trainer, tmp_path: Path) -> dict[str, Any]:
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    return torch.load(tmp_path / "one.ckpt", weights_only=False)


@pytest.mark.parametrize("linear", [True, False])
def test_nothing_is_replayed_and_nothing_is_written(tmp_path: Path, linear: bool) -> None:
    run(tmp_path, linear=linear, plain=True)
    plain = list(CALLS)
    run(tmp_path, linear=linear)
    assert plain == CALLS
    assert not list(tmp_path.iterdir())


def test_the_list_of_callbacks_is_that_which_the_user_gave(tmp_path: Path) -> None:
    class Seen(L.Callback):
        lists: list[list[L.Callback]]

        def on_fit_start(self, trainer: L.Trainer, *_: object) -> None:
            self.lists = [list(trainer.callbacks)]

        def on_train_start(self, trainer: L.Trainer, *_: object) -> None:
            self.lists.append(list(trainer.callbacks))

        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            self.lists.append(list(trainer.callbacks))

    seen = Seen()
    trainer = run(tmp_path, seen)
    [fallback] = [c for c in trainer.callbacks if isinstance(c, PrecisionFallback)]
    assert len(seen.lists) == 12
    assert all(each == [fallback, seen] for each in (*seen.lists, trainer.callbacks))
    assert fallback.supervisor is None


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_start", "on_train_batch_end"])
def test_it_wakes_between_two_steps_wherever_a_format_was_set(tmp_path: Path, hook: str) -> None:
    """In the midst of the micro-batches of a step, too."""

    def switch(trainer: L.Trainer, *_: object) -> None:
        first = hook == "on_train_start"
        if first or (trainer.fit_loop.epoch_loop.batch_idx == 2 and trainer.global_step < 2):
            trainer.precision_plugin.precision_map.set("layer", "fp8-dynamic", reason="by hand")

    setter = L.Callback()
    setattr(setter, hook, switch)
    trainer = run(tmp_path, setter, accumulate_grad_batches=2, steps=5)
    [fallback] = [c for c in trainer.callbacks if isinstance(c, PrecisionFallback)]
    assert fallback.supervisor is not None
    assert fallback.supervisor.failed_at is None
    assert fallback.run_dir is not None
    events = read_events(fallback.run_dir)
    assert [event.reason for event in events if event.kind == "format"] == ["by hand"]
    woken = {"on_train_start": 0, "on_train_batch_start": 2, "on_train_batch_end": 2}[hook]
    assert fallback.steps.attempted == 5 - woken


def test_it_wakes_with_the_first_step_left_out(tmp_path: Path) -> None:
    class Poison(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, module: Any) -> None:
            if trainer.global_step == 3:
                module.layer.weight.grad[0, 0] = float("nan")

    trainer = run(tmp_path, Poison())
    assert trainer.lightning_module.layer.weight.isfinite().all()
    [fallback] = [c for c in trainer.callbacks if isinstance(c, PrecisionFallback)]
    assert fallback.run_dir is not None
    events = read_events(fallback.run_dir)
    assert [event.step for event in events if event.kind == "skip"] == [3]


def test_it_does_not_sleep_over_a_rollout_that_begins_in_high_precision(tmp_path: Path) -> None:
    stages = (
        Stage(name="high", layers={"*": "high"}, until={"steps": 4}),
        Stage(name="low", layers={"*": "configured"}),
    )
    rollout = StagedRollout(RolloutRecipe(name="later", stages=stages))
    trainer = run(tmp_path, rollout, format="fp8-dynamic")
    [fallback] = [c for c in trainer.callbacks if isinstance(c, PrecisionFallback)]
    assert fallback.steps.attempted == 10
    assert trainer.precision_plugin.low_layers() == ["layer"]


def test_it_wakes_with_the_first_layer_in_low_precision(tmp_path: Path) -> None:
    trainer = run(tmp_path, Switch())
    [callback] = [c for c in trainer.callbacks if isinstance(c, PrecisionFallback)]
    assert callback.run_dir is not None
    kinds = [event.kind for event in read_events(callback.run_dir)]
    assert kinds[0] == "started"
    assert kinds.index("format") < kinds.index("rehearsal")
    assert CALLS.count(-1) > 10
    checkpoint = saved(trainer, tmp_path)
    assert checkpoint["callbacks"]["PrecisionFallback"]
    assert checkpoint["lightning_fp.run"]


def test_runs_that_wake_do_not_go_on_in_each_others_directories(tmp_path: Path) -> None:
    found: list[Path] = []
    for _ in range(2):
        trainer = run(tmp_path, Switch())
        [callback] = [c for c in trainer.callbacks if isinstance(c, PrecisionFallback)]
        assert callback.run_dir is not None
        found.append(callback.run_dir)
    first, second = map(read_events, found)
    assert found[0] != found[1]
    assert [event.kind for event in first] == [event.kind for event in second]


def test_the_checkpoint_is_that_of_a_plain_trainer(tmp_path: Path) -> None:
    class Save(L.Callback):
        checkpoint: dict[str, Any]

        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            self.checkpoint = saved(trainer, tmp_path)

    in_the_run = Save(), Save()
    plain = run(tmp_path, in_the_run[0], plain=True)
    trainer = run(tmp_path, in_the_run[1])
    for ours, theirs in (
        (in_the_run[1].checkpoint, in_the_run[0].checkpoint),
        (saved(trainer, tmp_path), saved(plain, tmp_path)),
    ):
        assert ours.keys() == theirs.keys()
        assert ours["callbacks"] == theirs["callbacks"]
    kinds = [type(callback) for callback in trainer.callbacks]
    assert kinds == [PrecisionFallback, Save]


def test_one_that_has_fallen_back_goes_on_telling(tmp_path: Path) -> None:
    """All layers are in high precision, and that there were incidents must not be forgotten."""
    woken = saved(run(tmp_path, Switch(back_at=6)), tmp_path)
    trainer = run(tmp_path, resume=tmp_path / "one.ckpt", steps=20)
    assert not trainer.precision_plugin.low_layers()
    again = saved(trainer, tmp_path)["callbacks"]["PrecisionFallback"]
    assert again["steps"]["attempted"] == 17
    assert woken["callbacks"]["PrecisionFallback"]["steps"]["attempted"] == 7
