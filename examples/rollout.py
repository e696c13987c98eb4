"""From high precision to FP8 in stages: a recipe of one's own, its gates, and what came of it."""

import argparse
import logging
from pathlib import Path

import lightning as L
import torch

from lightning_fp import ClampMonitor, FP8Precision
from lightning_fp.callbacks import StagedRollout
from lightning_fp.demo import ByteBatches, ByteGPT, read_sources
from lightning_fp.records import read_events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("runs/rollout"))
    recipe = Path(__file__).with_name("rollout_recipe.yaml")
    parser.add_argument("--recipe", default=str(recipe), help="a file, or e.g. bf16-cooldown")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")  # the rollout's lines

    L.seed_everything(0)
    torch.set_num_threads(1)
    text, _ = read_sources()
    rollout = StagedRollout(options.recipe, dirpath=options.output)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        plugins=FP8Precision("delayed", base="32-true", layers={"blocks.*": "fp8-delayed"}),
        callbacks=[ClampMonitor(every_n_steps=4), rollout],
        log_every_n_steps=5,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    batches = ByteBatches(text, batches=options.steps, batch_size=8, context=64)
    trainer.fit(ByteGPT(layers=4, width=64, heads=2), batches)

    print()
    for event in read_events(rollout.run_dir, kinds=["stage", "gate"]):
        print(event.sentence())
    print(f"\nThe run ended in stage {rollout.stage}.")


if __name__ == "__main__":
    main()
