"""LoRA beside frozen FP8 weights, of which only the cast is kept: PEFT, Trainer, merge.

python examples/lora.py --steps 50
"""

from __future__ import annotations

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_fp
from lightning_fp import FP8Precision


class Network(nn.Module):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Adapted(L.LightningModule):
    """Learns to shift a frozen network's output."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LoraConfig(r=16, target_modules=["up", "down"])
        self.network = get_peft_model(Network(width), config)  # freezes what is not an adapter
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = F.mse_loss(self.network(batch), batch.roll(1, -1))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args().steps

    plugin = FP8Precision("dynamic", frozen="stored")
    trainer = L.Trainer(
        max_steps=steps,
        plugins=plugin,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, data = Adapted(), torch.randn(32 * steps, 256)
    trainer.fit(model, DataLoader(data, batch_size=32))

    assert plugin.report is not None
    saved = plugin.report.saved_bytes / 1e6
    print(f"{len(plugin.report.stored)} frozen layers keep only FP8, {saved:.1f} MB less")
    print(f"loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f}")
    # A checkpoint has the weights in their own dtype: it loads into the plain model.
    print(f"in a checkpoint: {next(iter(model.state_dict().values())).dtype}")
    # Merging writes to the frozen weights, so they must be whole again.
    given = lightning_fp.unstore(model)
    merged = model.network.merge_and_unload()
    print(f"merged into {given} layers: {merged.up}")


if __name__ == "__main__":
    main()
