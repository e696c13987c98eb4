"""A model, a part of it, and the Trainer can be pickled after the run, as with plain Lightning."""

from __future__ import annotations

import pickle
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from lightning_fp import ClampMonitor, FP8Precision, PrecisionFallback


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.body(batch).float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.compatibility("wrappers", "pickling a model, a part of it, a Trainer", "works")
def test_what_a_run_leaves_can_be_pickled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        plugins=FP8Precision("delayed"),
        callbacks=[ClampMonitor(), PrecisionFallback()],
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(32, 32), batch_size=8))
    pickle.loads(pickle.dumps(trainer))
    x = torch.randn(8, 32)
    kept = model.body.eval()
    for loaded in (pickle.loads(pickle.dumps(model)).body, pickle.loads(pickle.dumps(kept))):
        assert torch.equal(loaded.eval()(x), kept(x))
        loaded.train()(x).sum().backward()
        assert all(parameter.grad is not None for parameter in loaded.parameters())
