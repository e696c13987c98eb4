"""The demo's text: the Python sources of the standard library, read as bytes."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HELD_OUT = 10
"""Every so many files one is kept for validation."""


def read_sources() -> tuple[Tensor, Tensor]:
    """Every top-level module of the standard library, in alphabetical order.

    Returns:
        Training and validation text, uint8, one value per byte. The split is by file, so the two
        share no line by construction.

    Raises:
        ValueError: if this Python came without its sources.
    """
    directory = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(directory.glob("*.py"))
    if len(files) < HELD_OUT:
        raise ValueError(
            f"the demo trains on the standard library's sources, and {directory} has none; run it"
            " with a Python that was installed with them"
        )
    held_out = files[::HELD_OUT]
    training = [file for file in files if file not in held_out]
    return _read(training), _read(held_out)


def _read(files: list[Path]) -> Tensor:
    text = b"\n".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class ByteBatches:
    """A loader whose batches depend on the seed and their number only.

    It is stateful in Lightning's sense: a checkpoint keeps its position, so a run can be resumed
    at any step and sees the batches that the uninterrupted run would have seen.

    Args:
        text: uint8 [bytes].
        batches: how many batches it gives.
        batch_size: sequences per batch.
        context: bytes per sequence.
        seed: other seeds give other batches.
    """

    def __init__(
        self, text: Tensor, *, batches: int, batch_size: int, context: int, seed: int = 0
    ) -> None:
        self.text = text
        self.batches = batches
        self.batch_size = batch_size
        self.context = context
        self.seed = seed
        self._position = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        while self._position < self.batches:
            self._position += 1
            yield self._batch(self._position)
        self._position = 0

    def _batch(self, number: int) -> Tensor:
        """Batch `number`: int64 [batch_size, context + 1], inputs and targets in one."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        last = len(self.text) - self.context - 1
        starts = torch.randint(last, (self.batch_size, 1), generator=generator)
        return self.text[starts + torch.arange(self.context + 1)].long()

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch that was given last."""
        self._position = state["position"]
