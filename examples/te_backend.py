"""Transformer Engine as the backend where it runs; elsewhere why not, and what runs instead."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fp import ClampMonitor, FP8Precision, PrecisionFallback
from lightning_fp.kernels.transformer_engine import availability


class Regression(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.GELU())
        self.head = nn.Linear(256, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self.head(self.body(x)).float(), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    L.seed_everything(0)
    reasons = availability()
    for format, reason in reasons.items():
        print(f"{format:12} {'runs' if reason is None else reason}")
    there = reasons["fp8-delayed"] is None
    backend = "transformer-engine" if there else "auto"
    print(f"backend: {backend}")

    # The layers are named because ones this small gain nothing, and would be left in bf16.
    plugin = FP8Precision("delayed", backend=backend, layers={"body.*": "fp8-delayed"})
    trainer = L.Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        max_epochs=2,
        plugins=plugin,
        # Telemetry and fallback are the same over every backend.
        callbacks=[ClampMonitor(dirpath="run"), PrecisionFallback(dirpath="run")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    x = torch.randn(2048, 256)
    # Transformer Engine wants a multiple of 8 rows: drop_last keeps the last batch from being odd.
    data = DataLoader(TensorDataset(x, x[:, :1].sin()), batch_size=64, drop_last=True)
    trainer.fit(Regression(), data)
    kernels = {layer.name: layer.kernel for layer in plugin.report.layers}
    print(f"kernels: {kernels}")
    print(f"loss: {trainer.callback_metrics['loss']:.3f}")


if __name__ == "__main__":
    main()
