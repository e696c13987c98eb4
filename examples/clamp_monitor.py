"""Which layer does FP8 hurt? A network under delayed scaling, one of whose layers now and then gets
inputs that its scale did not foresee, and what ClampMonitor makes of it.
"""

import argparse
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fp import DelayedScaling, FP8Precision
from lightning_fp.callbacks import ClampMonitor
from lightning_fp.records import read_statistics


class Network(L.LightningModule):
    """Four layers; every tenth step, the input of the third is 30 times larger."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        target = x.roll(1, dims=-1)
        for index, layer in enumerate(self.layers):
            spike = 30.0 if index == 2 and batch_idx % 10 == 9 else 1.0
            x = torch.tanh(layer(x * spike)) + x
        return F.mse_loss(x.float(), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/clamp_monitor"))
    directory = parser.parse_args().output

    L.seed_everything(0)
    # A history of 4 steps has forgotten the last spike when the next one comes.
    plugin = FP8Precision(DelayedScaling(history_len=4), layers={"layers.*": "fp8-delayed"})
    # Every step is sampled, so that this short run shows something; the default is every 16th.
    monitor = ClampMonitor(every_n_steps=1, dirpath=directory, log_every_n_steps=20)
    trainer = L.Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        max_steps=120,
        plugins=plugin,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    data = TensorDataset(torch.randn(120 * 32, 64))
    trainer.fit(Network(), DataLoader(data, batch_size=32))

    table = read_statistics(monitor.run_dir, columns=["layer", "operand", "clamped_mass"])
    rows = [row for row in table.to_pylist() if row["operand"] == "input"]
    print("\nlargest clamped mass of the input, over all intervals:")
    for layer in sorted({row["layer"] for row in rows}):
        mass = max(row["clamped_mass"] for row in rows if row["layer"] == layer)
        print(f"  {layer}: {mass:.2%}")
    print(f"\nMore: lightning-fp stats {monitor.run_dir} --layer layers.2")


if __name__ == "__main__":
    main()
