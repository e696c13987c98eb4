"""A layer goes wrong in FP8, in mid-run: PrecisionFallback notices, finds the layer by replaying
the run in high precision, gives it a safer format, and goes on from where high precision would be.
"""

import argparse
import logging
from pathlib import Path

import lightning as L
import torch

from lightning_fp import FP8Precision, PrecisionFallback
from lightning_fp.demo import ByteBatches, ByteGPT, read_sources
from lightning_fp.demo.faults import BackwardCorruption
from lightning_fp.records import read_events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/fallback"))
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")  # the fallback's lines

    L.seed_everything(0)
    text, _ = read_sources()
    # The gradient that comes back through this layer is mostly lost, but only while it is in FP8,
    # as a kernel at fault would do it. The loss does not jump: it stops improving.
    fault = BackwardCorruption("blocks.1.mlp.down", kind="zero", strength=2.0, start=85)
    fallback = PrecisionFallback(dirpath=options.output)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        plugins=FP8Precision("dynamic", base="32-true", layers={"blocks.*": "fp8-dynamic"}),
        callbacks=[fault, fallback],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    torch.set_num_threads(1)
    batches = ByteBatches(text, batches=options.steps, batch_size=8, context=64)
    trainer.fit(ByteGPT(layers=2, width=64, heads=2), batches)

    print()
    for event in read_events(fallback.run_dir, kinds=["suspect", "verdict", "demote", "rollback"]):
        print(event.sentence())
    formats = {
        layer: change
        for event in read_events(fallback.run_dir, kinds=["demote"])
        for layer, change in event.formats.items()
    }
    print(f"\ndemoted: {formats}")
    print(fallback.steps.sentence())


if __name__ == "__main__":
    main()
