"""FP8 under Lightning Fabric: a byte-level GPT, with the watch, records and accumulation."""

import argparse
from pathlib import Path

import lightning as L
import torch

from lightning_fp.demo import ByteBatches, ByteGPT, read_sources
from lightning_fp.loop import PrecisionLoop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/fabric"))
    options = parser.parse_args()

    fabric = L.Fabric(accelerator="auto", devices=1)
    fabric.seed_everything(0)
    text, held_out = read_sources()
    model = ByteGPT(layers=2, width=64, heads=2, context=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    module, wrapped = fabric.setup(model, optimizer)
    # Fabric brings device and ranks, the loop brings precision: what it is handed has been set up.
    loop = PrecisionLoop(
        module, wrapped, "delayed", clip_norm=1.0, fabric=fabric, dirpath=options.output
    )

    def compute_loss(rows: torch.Tensor) -> torch.Tensor:
        logits = module(rows[:, :-1]).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    count = options.steps * options.accumulate
    batches = iter(ByteBatches(text, batches=count, batch_size=8, context=64))
    for step in range(options.steps):
        micro = [fabric.to_device(next(batches)) for _ in range(options.accumulate)]
        loss = loop.step(compute_loss, micro)
        if (step + 1) % 25 == 0:
            fabric.print(f"step {step + 1:4}: loss {loss.item():.4f}")
    with loop.evaluation():
        (rows,) = ByteBatches(held_out, batches=1, batch_size=16, context=64)
        fabric.print(
            f"held-out loss, in high precision: {compute_loss(fabric.to_device(rows)):.4f}"
        )
    loop.close()
    fabric.print(loop.steps.sentence())
    fabric.print(f"More: lightning-fp report {loop.directory}")


if __name__ == "__main__":
    main()
