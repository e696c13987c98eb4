"""LossRecorder: each step's loss, gradient norm and time, in any precision."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from lightning_fp.argument_types import checked
from lightning_fp.callbacks.run.run import RunCallback


class LossRecorder(RunCallback):
    """Writes down a run that others are to be compared with, usually one in BF16.

    `<dirpath>/loss.csv` gets the loss of every step, the norm of its gradient before clipping, and
    the seconds it took; `<dirpath>/run.jsonl` what the run is. The loss is the mean over
    micro-batches and ranks; in manual optimization it is the sum of what `manual_backward` is given
    in a step, over all optimizers. It works with any precision plugin, also without one of this
    package. Under FSDP1 norms are left out: each rank has only a part.

    >>> import lightning as L
    >>> trainer = L.Trainer(
    ...     accelerator="cpu", precision="bf16-mixed", callbacks=[LossRecorder("runs/bf16")]
    ... )

    Args:
        dirpath: where to write; by default the run's directory.
    """

    writes_loss: ClassVar[bool] = True
    needs_grad_norm: ClassVar[bool] = True

    @checked
    def __init__(self, dirpath: str | Path | None = None) -> None:
        self.dirpath = dirpath
