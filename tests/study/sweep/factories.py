"""Factories for sweeps: a net of two layers, quickly trained; and those that misbehave."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader


class Fit(L.LightningModule):
    def __init__(self, lr: float, width: int = 32) -> None:
        super().__init__()
        self.lr = lr
        self.layers = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 16))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return (self.layers(batch) - batch.flip(1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def batches() -> DataLoader:
    return DataLoader(torch.randn(64, 16), batch_size=16)


def fit(lr: float, width: int = 32):
    return Fit(lr, width), batches()


def no_rate():
    return Fit(1e-3), batches()


def raises(lr: float):
    raise RuntimeError("no such data")


KEPT = Fit(1e-3)


def same_model(lr: float):
    return KEPT, batches()


GENERATOR = torch.Generator().manual_seed(0)


def own_generator(lr: float):
    model = Fit(lr)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=GENERATOR)
    return model, batches()


ITERATOR = iter(DataLoader(torch.randn(4096, 16), batch_size=16))


def used_up(lr: float):
    return Fit(lr), ITERATOR


class Remembers(Fit):
    """Training leaves weights behind, which the next model begins with."""

    left: dict[str, torch.Tensor] | None = None

    def __init__(self, lr: float) -> None:
        super().__init__(lr)
        if Remembers.left is not None:
            self.load_state_dict(Remembers.left)

    def on_train_end(self) -> None:
        Remembers.left = {name: value.clone() for name, value in self.state_dict().items()}


def remembers(lr: float):
    return Remembers(lr), batches()


class Breaks(Fit):
    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        if self.lr > 0.05 and self.global_step == 3:
            raise RuntimeError("out of something")
        return super().training_step(batch, index)


def breaks(lr: float):
    return Breaks(lr), batches()
