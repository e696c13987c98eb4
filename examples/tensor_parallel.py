"""Tensor parallelism in FP8: each of two processes has half of every MLP, and multiplies it alone.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

On a machine with GPUs each process takes one, else both share the CPU.
"""

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from lightning_fp import ClampMonitor, FP8Precision, PrecisionFallback

WIDTH = 64


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
        mesh = self.device_mesh
        for block in self.model[:2]:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh["tensor_parallel"], plan)
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(
            self.model, mesh=mesh["data_parallel"]
        )  # call this one, and it gathers the rest

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.model(x).float(), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    L.seed_everything(0)
    x = torch.randn(2048, WIDTH)
    y = (x @ torch.randn(WIDTH, 4)).argmax(dim=-1)
    data = DataLoader(TensorDataset(x, y), batch_size=64, drop_last=True)

    # Named, because layers as small as these would gain nothing on FP8 hardware.
    plugin = FP8Precision("fp8-delayed", layers={"model.[01].*": "fp8-delayed"})
    trainer = L.Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2),
        max_epochs=2,
        plugins=plugin,
        callbacks=[ClampMonitor(every_n_steps=16), PrecisionFallback()],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(), data)

    if trainer.is_global_zero:
        up = plugin.precision_map.layers["model.0.up"].weight
        print(f"this rank's part of model.0.up: {tuple(up.to_local().shape)} of {tuple(up.shape)}")
        print(f"formats: {plugin.precision_map.formats()}")
        print(f"loss: {trainer.callback_metrics['loss']:.3f}")


if __name__ == "__main__":
    main()
