"""A tuner in mid-run takes the callbacks away and trains by itself: our run goes on as if not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fp import ClampMonitor, FP8Precision, ParityProbe, PrecisionFallback
from lightning_fp.records import read_events
from tests.helper import make_trainer

STEPS, EPOCHS = 20, 3


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = 1e-3
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class InMidRun(LearningRateFinder):
    """As Lightning's documentation suggests: again at the start of an epoch."""

    def on_fit_start(self, *_: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch:
            self.lr_find(trainer, pl_module)


def losses(callbacks: list[L.Callback], directory: Path) -> list[float]:
    data = torch.randn(STEPS * 8, 16, generator=torch.Generator().manual_seed(1))
    model = Net()
    trainer = make_trainer(
        FP8Precision("delayed", layers={"*": "fp8-delayed"}),
        default_root_dir=directory,
        max_epochs=EPOCHS,
        max_steps=-1,
        callbacks=[InMidRun(num_training_steps=10, update_attr=False), *callbacks],
    )
    trainer.fit(model, DataLoader(data, batch_size=8))
    return model.losses


@pytest.mark.filterwarnings("ignore")
def test_a_learning_rate_finder_in_mid_run_changes_nothing(tmp_path: Path) -> None:
    plain = losses([], tmp_path / "plain")
    ours = [PrecisionFallback(), ClampMonitor(), ParityProbe(every_n_steps=STEPS)]
    assert losses(ours, tmp_path / "ours") == plain
    events = [e for d in (tmp_path / "ours").rglob("events.jsonl") for e in read_events(d.parent)]
    assert not [event for event in events if event.kind == "watch_failed"]
    (ended,) = [event for event in events if event.kind == "note"]
    assert ended.numbers["useful"] == EPOCHS * STEPS
