"""What `lightning-fp demo` does, the way one would write it oneself: train a GPT in FP8, change a
layer's format in mid-run, save, resume, and end where the uninterrupted run ends.
"""

import argparse
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_fp import FP8Precision
from lightning_fp.demo import ByteBatches, ByteGPT, read_sources


class FlipLayer(L.Callback):
    """After `step` steps, one layer goes to BF16."""

    def __init__(self, plugin: FP8Precision, step: int) -> None:
        self.formats, self.step = plugin.precision_map, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            self.formats.set("blocks.1.mlp.down", "bf16", reason="to show that it can")


def train(steps: int, output: Path, resume: Path | None = None) -> ByteGPT:
    L.seed_everything(0)
    text, _ = read_sources()
    batches = ByteBatches(text, batches=steps, batch_size=8, context=64)  # a stateful loader
    plugin = FP8Precision("dynamic", layers={"blocks.*": "fp8-dynamic"})
    half = ModelCheckpoint(output, "{step}", every_n_train_steps=steps // 2, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        max_epochs=1,
        plugins=plugin,
        callbacks=[FlipLayer(plugin, steps // 4), half],
        deterministic=torch.cuda.is_available(),
        logger=False,
    )
    model = ByteGPT()
    trainer.fit(model, batches, ckpt_path=resume)
    return model.cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("runs/byte_gpt"))
    options = parser.parse_args()

    model = train(options.steps, options.output)
    checkpoint = options.output / f"step={options.steps // 2}.ckpt"
    resumed = train(options.steps, options.output / "resumed", resume=checkpoint)
    pairs = zip(model.parameters(), resumed.parameters(), strict=True)
    print(f"resumed run ended with the same weights: {all(torch.equal(a, b) for a, b in pairs)}")


if __name__ == "__main__":
    main()
