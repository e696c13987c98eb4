"""FP8 in a Trainer: one argument more."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fp import FP8Precision


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU())
        self.head = nn.Linear(128, 4)
        self.example_input_array = torch.zeros(1, 64)  # the report then counts FLOPs in a forward

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x).float(), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    L.seed_everything(0)
    x = torch.randn(4096, 64)
    y = (x @ torch.randn(64, 4)).argmax(dim=-1)
    # FP8 hardware multiplies multiples of 16 rows: drop_last keeps the last batch from being odd.
    data = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True, drop_last=True)

    # "body.*" is named because layers as small as these would gain nothing on FP8 hardware, and
    # the defaults would leave them in bf16 there. In a real model, FP8Precision() is enough.
    plugin = FP8Precision(layers={"body.*": "fp8-dynamic"})
    trainer = L.Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        max_epochs=2,
        plugins=plugin,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(), data)

    print(f"formats: {plugin.precision_map.formats()}")
    print(f"loss: {trainer.callback_metrics['loss']:.3f}")


if __name__ == "__main__":
    main()
