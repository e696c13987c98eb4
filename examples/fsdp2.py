"""FSDP2 in FP8: two processes share weights, gradients and optimizer state.

    torchrun --nproc-per-node 2 examples/fsdp2.py

On a machine with GPUs each process takes one, else both share the CPU. At the end the sharded
checkpoint becomes one file, which loads into the plain model.
"""

from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_fp import ClampMonitor, FP8Precision, PrecisionFallback

WIDTH = 64
CHECKPOINT, ONE_FILE = Path("fsdp2.ckpt"), Path("fsdp2.pt")


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(MLP(), MLP(), nn.Linear(WIDTH, 4))

    def configure_model(self) -> None:
        """Lightning calls it before `fit`, with the mesh of the strategy."""
        if isinstance(self.model, FSDPModule):  # and before `validate` once more
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.model[:2]:
            fully_shard(block, mesh=mesh)  # gathered for its forward and backward alone
        fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.model(x).float(), y)
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    L.seed_everything(0)
    x = torch.randn(2048, WIDTH)
    y = (x @ torch.randn(WIDTH, 4)).argmax(dim=-1)
    data = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, drop_last=True)

    # Named, because layers as small as these would gain nothing on FP8 hardware.
    plugin = FP8Precision("fp8-delayed", layers={"model.[01].*": "fp8-delayed"})
    trainer = L.Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_epochs=2,
        plugins=plugin,
        callbacks=[ClampMonitor(every_n_steps=16), PrecisionFallback()],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(), data)
    trainer.save_checkpoint(CHECKPOINT)

    if trainer.is_global_zero:
        up = plugin.precision_map.layers["model.0.up"].weight
        print(f"this rank's part of model.0.up: {tuple(up.to_local().shape)} of {tuple(up.shape)}")
        print(f"formats: {plugin.precision_map.formats()}")
        print(f"loss: {trainer.callback_metrics['loss']:.3f}")
        dcp_to_torch_save(CHECKPOINT, ONE_FILE)
        state = torch.load(ONE_FILE, weights_only=True)["state_dict"]
        print(f"loads into the plain model: {Classifier().load_state_dict(state)}")


if __name__ == "__main__":
    main()
