"""A fallback over a model in high precision leaves no trace until there is something to tell."""

from __future__ import annotations

from pathlib import Path

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
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Switch(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 3:
            trainer.precision_plugin.precision_map.set("layer", "fp8-dynamic", reason="by hand")


def run(tmp_path: Path, *callbacks: L.Callback, linear: bool = True) -> L.Trainer:
    torch.manual_seed(0)
    CALLS.clear()
    model = Model(linear)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=10,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        plugins=FP8Precision("high"),
        callbacks=[PrecisionFallback(), *callbacks],
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(80, 32), batch_size=8))
    return trainer


@pytest.mark.parametrize("linear", [True, False])
def test_nothing_is_replayed_and_nothing_is_written(tmp_path: Path, linear: bool) -> None:
    run(tmp_path, linear=linear)
    assert len(CALLS) == 10
    assert not list(tmp_path.iterdir())


def test_it_wakes_with_the_first_layer_in_low_precision(tmp_path: Path) -> None:
    trainer = run(tmp_path, Switch())
    [callback] = [c for c in trainer.callbacks if isinstance(c, PrecisionFallback)]
    assert callback.run_dir is not None
    kinds = [event.kind for event in read_events(callback.run_dir)]
    assert kinds[0] == "started"
    assert kinds.index("format") < kinds.index("rehearsal")
    assert len(CALLS) > 10
