"""The state of what is no tensor and has one: generators of random numbers, numpy arrays."""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class OwnState:
    """What an object held at one moment."""

    kind: type
    state: Any

    @classmethod
    def of(cls, value: object) -> OwnState | None:
        """The state of now; None for what is neither a generator nor an array of numbers."""
        numpy: Any = sys.modules.get("numpy")
        kind = type(value)
        if isinstance(value, torch.Generator):
            return cls(kind, value.get_state())
        if isinstance(value, random.Random):
            return cls(kind, value.getstate())
        if numpy is None:
            return None
        if isinstance(value, numpy.random.Generator):
            return cls(kind, copy.deepcopy(value.bit_generator.state))  # pyright: ignore
        if isinstance(value, numpy.random.RandomState):
            return cls(kind, value.get_state(legacy=False))  # pyright: ignore
        if kind is numpy.ndarray and not value.dtype.hasobject:  # pyright: ignore
            return cls(kind, value.copy())  # pyright: ignore
        return None

    @property
    def is_array(self) -> bool:
        """Whether it is of an array, and not of a generator."""
        return hasattr(self.kind, "__array__")

    def put_into(self, now: Any) -> Any:
        """Give an object this state.

        Args:
            now: what is there now.

        Returns:
            The same object; of an array that does not fit another one.
        """
        if self.is_array:
            fits = type(now) is self.kind and now.shape == self.state.shape
            if not (fits and now.dtype == self.state.dtype and now.flags.writeable):
                return self.state.copy()
            now[...] = self.state
        elif type(now) is self.kind:
            if isinstance(now, random.Random):
                now.setstate(self.state)
            elif hasattr(now, "bit_generator"):
                now.bit_generator.state = self.state
            else:
                now.set_state(self.state)
        return now
