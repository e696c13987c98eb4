"""The state of every random number generator that a training step may draw from."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """Where the global generators stand; about 20 microseconds to capture, 8 kB to keep."""

    python: Any
    """Of the `random` module."""

    numpy: Any
    """Of numpy's global generator; None while numpy is not loaded."""

    torch: Tensor
    """Of torch on the CPU."""

    cuda: list[Tensor]
    """Of torch on each CUDA device; empty while CUDA is not in use."""

    @classmethod
    def capture(cls) -> RandomState:
        """The state at this moment."""
        numpy = sys.modules.get("numpy")
        return cls(
            python=random.getstate(),
            numpy=None if numpy is None else numpy.random.get_state(),
            torch=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        )

    def restore(self) -> None:
        """Go back to it."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
