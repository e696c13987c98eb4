"""BatchSeeds: torch's generator, seeded before each training batch from what is in checkpoints.

Formats that round by chance draw from torch's generator, as dropout does, so that activation
checkpointing and replays, which put it back, repeat what they drew. Lightning's checkpoints do not
hold it. A seed of the run and a count of its batches do as well: what a batch draws follows from
them alone, whatever loaders, evaluations and earlier batches have drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch


class BatchSeeds:
    """The seeds of a run's batches."""

    def __init__(self) -> None:
        self._seed: int | None = None
        self._batches = 0

    def next(self) -> None:
        """Seed torch's generators, of all devices, for the batch that comes."""
        if self._seed is None:
            self._seed = torch.initial_seed()
        words = f"{self._seed} {self._batches}".encode()
        torch.manual_seed(int.from_bytes(blake2b(words, digest_size=8).digest(), "little"))
        self._batches += 1

    def state_dict(self) -> dict[str, Any]:
        """The run's seed, None before its first batch, and how many batches there were."""
        return {"seed": self._seed, "batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        self._seed, self._batches = state["seed"], state["batches"]
