"""A model whose layer `inner` gets inputs up to 64 times as large in a few steps, too far apart for
delayed scaling to remember the last time: it clamps them. Without clamping they do no harm."""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

STEPS = 100
OUTLIERS = (29, 49, 66, 85)
BATCH, WIDTH = 64, 16


class Outliers(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.outer = nn.Linear(WIDTH, WIDTH)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, size, y = batch  # the loss of an unclamped model does not depend on the size
        loss = F.mse_loss(self.outer(torch.tanh(self.inner(x * size) / size)).float(), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * BATCH, WIDTH, generator=generator)
    y = torch.tanh(x @ torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
    size = torch.ones(STEPS, BATCH, 1)
    size[torch.tensor(OUTLIERS) - 1] = 64.0
    return DataLoader(TensorDataset(x, size.flatten(0, 1), y), batch_size=BATCH)


def build() -> tuple[L.LightningModule, DataLoader]:
    return Outliers(), data()


def build_clipped() -> tuple[L.LightningModule, DataLoader, dict]:
    return Outliers(), data(), {"gradient_clip_val": 0.5}


def build_model_only() -> nn.Module:
    return Outliers()
