"""A fallback over a model in high precision leaves no trace until there is something to tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_fp import FP8Precision, PrecisionFallback
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
    resume: Path | None = None,
    steps: int = 10,
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
        plugins=None if plain else FP8Precision("high", base="32-true"),
        callbacks=[*([] if plain else [PrecisionFallback()]), *callbacks],
    )
    loader = torch.utils.data.DataLoader(torch.randn(80, 32), batch_size=8)
    trainer.fit(model, loader, ckpt_path=resume, weights_only=False)
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
    assert again["steps"]["attempted"] == 20
    assert woken["callbacks"]["PrecisionFallback"]["steps"]["attempted"] == 10
