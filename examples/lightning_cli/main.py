"""Everything of a run from one YAML file: `python main.py fit --config config.yaml`.

Any option can be given on the command line too, e.g. `--trainer.max_steps 100` or
`--trainer.callbacks+=lightning_fp.ParityProbe`; `--print_config` shows all of them.
"""

import lightning as L

from lightning_fp.cli.lightning_cli import LightningCLI  # Lightning's, with errors in one line
from lightning_fp.demo import ByteBatches, ByteGPT, read_sources


class Sources(L.LightningDataModule):
    """The standard library's sources, as bytes.

    Args:
        batches: in an epoch.
        batch_size: sequences in a batch.
        context: bytes in a sequence.
    """

    def __init__(self, batches: int = 1000, batch_size: int = 8, context: int = 64) -> None:
        super().__init__()
        self.text, self.held_out = read_sources()
        self.batches, self.batch_size, self.context = batches, batch_size, context

    def train_dataloader(self) -> ByteBatches:
        return self._loader(self.text, self.batches)

    def val_dataloader(self) -> ByteBatches:
        return self._loader(self.held_out, 20)

    def _loader(self, text, batches: int) -> ByteBatches:
        return ByteBatches(text, batches=batches, batch_size=self.batch_size, context=self.context)


def main(args: list[str] | None = None) -> LightningCLI:
    return LightningCLI(ByteGPT, Sources, args=args)


if __name__ == "__main__":
    main()
