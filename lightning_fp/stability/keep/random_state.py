"""The state of every random number generator that a training step may draw from."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """Where the global generators stand; about 20 microseconds to capture, 32 kB to keep."""

    python: Any
    """Of the `random` module."""

    numpy: Any
    """Of numpy's global generator, of whatever kind; None while numpy is not loaded."""

    torch: Tensor
    """Of torch on the CPU."""

    cuda: list[Tensor]
    """Of torch on each CUDA device; empty while CUDA is not in use."""

    @classmethod
    def capture(cls) -> RandomState:
        """The state at this moment."""
        # Nothing is imported and no device set up for this: what is not loaded has drawn nothing.
        # `legacy=False`: the old form of numpy's state exists for one kind of generator only.
        numpy = sys.modules.get("numpy")
        return cls(
            python=random.getstate(),
            numpy=None if numpy is None else numpy.random.get_state(legacy=False),
            torch=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        )

    def restore(self) -> None:
        """Go back to it."""
        random.setstate(self.python)
        if self.numpy is not None:
            importlib.import_module("numpy").random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)

    @property
    def nbytes(self) -> int:
        """Bytes to keep, about; Python's words lie in a tuple of objects."""
        words = 624 * (40 if self.numpy is None else 44)
        return words + sum(state.numel() for state in (self.torch, *self.cuda))

    def state_dict(self) -> dict[str, Any]:
        """As tensors, numbers and strings, which load with `weights_only=True`."""
        version, words, gauss = self.python
        return {
            "python": [version, torch.tensor(words), gauss],
            "numpy": _without_arrays(self.numpy),
            "torch": self.torch,
            "cuda": list(self.cuda),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RandomState:
        """The state that `state_dict` was called on."""
        version, words, gauss = state["python"]
        return cls(
            python=(version, tuple(words.tolist()), gauss),
            numpy=_with_arrays(state["numpy"]),
            torch=state["torch"].cpu(),
            cuda=[each.cpu() for each in state["cuda"]],
        )


def _without_arrays(numpy_state: Any) -> Any:
    """Words of 32 bits as a tensor, longer ones, of which there are few, as a list."""
    if isinstance(numpy_state, Mapping):
        return {key: _without_arrays(item) for key, item in numpy_state.items()}
    if not hasattr(numpy_state, "dtype"):
        return numpy_state
    words: list[int] = numpy_state.tolist()
    return torch.tensor(words) if numpy_state.dtype.itemsize == 4 else words


def _with_arrays(plain: Any) -> Any:
    if isinstance(plain, Mapping):
        return {key: _with_arrays(item) for key, item in plain.items()}
    if isinstance(plain, Tensor):
        return importlib.import_module("numpy").array(plain.tolist(), dtype="uint32")
    if isinstance(plain, list):
        return importlib.import_module("numpy").array(plain, dtype="uint64")
    return plain
