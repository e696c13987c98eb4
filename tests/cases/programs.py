"""What the cases share: a small program under Lightning, run plain or with a plugin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fp import FP8Precision

PLAIN = "bf16-mixed"
"""What a case is compared with: the precision that our plugins have beside their layers."""


class Program(L.LightningModule):
    """x [batch, 32] to one number; the target is the mean of the inputs."""

    rate = 0.05

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
        self.head = nn.Linear(32, 1)

    def loss(self, x: Tensor) -> Tensor:
        return (self.head(self.body(x)).float() - x.float().mean(1, keepdim=True)).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def rows(n: int, *, seed: int = 0, shape: Sequence[int] = (32,)) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def fit(
    module: L.LightningModule,
    precision: str | Precision,
    tmp_path: Path,
    *callbacks: L.Callback,
    data: Iterable[Any] | None = None,
    **options: Any,
) -> L.Trainer:
    """Train on four batches of 8, or on what is given; quietly, from one seed."""
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    given: dict[str, Any] = {"plugins": precision} if isinstance(precision, Precision) else {}
    if isinstance(precision, str):
        given["precision"] = precision
    if callbacks:
        given["callbacks"] = list(callbacks)
    if "barebones" not in options:
        given.update(quiet)
    trainer = L.Trainer(
        **{"accelerator": "cpu", "max_epochs": 1, "default_root_dir": tmp_path, **given, **options}
    )
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(rows(32), batch_size=8) if data is None else data)
    return trainer


def made(kind: type[L.LightningModule], **attributes: Any) -> Any:
    """A module from one seed."""
    torch.manual_seed(0)
    module = kind()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def weights(module: nn.Module) -> Tensor:
    found = [p.detach() for p in module.parameters()]
    real = [torch.view_as_real(p) if p.is_complex() else p for p in found]
    return torch.cat([p.float().flatten() for p in real])


def error(found: Tensor, expected: Tensor) -> float:
    """The distance relative to what is expected."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def high() -> FP8Precision:
    """A plugin whose layers are all in high precision, over the plain run's base."""
    return FP8Precision("high")
