"""Plain attributes of objects as a part of snapshots: step counters, memory banks, averages.

A training step may read what lies neither in a parameter nor in a buffer. With a step counter or a
memory bank of now instead of its time, the run's own steps, made again, came out 0.8% to 57% off;
with it put back they were equal to the bit. Only what can be copied for certain is taken: plain
values, tensors, arrays, generators of random numbers, and small containers of these. Objects of
other classes may be anything, a logger or a data set, and are left alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fp.stability.keep.own_state import OwnState

_NUMBERS = (bool, int, float, str, type(None))
_MOST_ITEMS = 64
"""A container with more is a record that only grows, and no part of a state."""
_CONTAINERS = (list, tuple, dict, OrderedDict)
_DEPTH = 2
_MOST_BYTES = 2**24
"""A larger numpy array is data, and no part of a state."""

_APART = frozenset(vars(nn.Module())) | frozenset(vars(Optimizer([torch.zeros(1)], {})))
"""What belongs to torch itself: parameters, buffers, hooks, groups."""


class Attributes:
    """Attributes that are numbers, text, tensors, arrays, generators, or lists and dicts of these.

    All else is not looked at, nor are containers of more than 64 items.

    Args:
        owners: whose attributes, by name.
    """

    def __init__(self, owners: Mapping[str, object]) -> None:
        self._owners = owners
        self.numbers = True
        """Whether `load_state_dict` puts back all; else only what has tensors in it. Numbers often
        count steps, and a run that goes on from a snapshot counts on."""

    def state_dict(self) -> dict[str, Any]:
        """By owner and name; tensors are shared, not copied."""
        state: dict[str, Any] = {}
        for owner, item in self._owners.items():
            plain = {
                name: _taken(value)
                for name, value in vars(item).items()
                if name not in _APART and _is_plain(value, _DEPTH)
            }
            if plain:
                state[owner] = plain
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Put them back, into the tensors and containers that are there where these fit."""
        for owner, saved in state_dict.items():
            if owner not in self._owners:
                continue
            attributes = vars(self._owners[owner])
            for name, value in saved.items():
                if self.numbers or _has_tensors(value):
                    attributes[name] = _put_back(attributes.get(name), value)


def _is_plain(value: Any, depth: int) -> bool:
    kind = type(value)
    if kind in _NUMBERS:
        return True
    if kind is Tensor:
        # One that belongs to a graph keeps its activations alive, and is none of the next step's.
        free = value.grad_fn is None and not value.is_inference()
        return free and value.layout is torch.strided
    if kind not in _CONTAINERS:
        size: object = getattr(value, "nbytes", 0)  # of anything, so it may be anything
        large = isinstance(size, int) and size > _MOST_BYTES
        return not large and OwnState.of(value) is not None
    if depth == 0 or len(value) > _MOST_ITEMS:
        return False
    keys = list(value) if isinstance(value, dict) else []
    items = list(value.values()) if isinstance(value, dict) else list(value)
    named = all(type(key) in _NUMBERS for key in keys)
    return named and all(_is_plain(item, depth - 1) for item in items)


def _taken(value: Any) -> Any:
    """As it is now, but for tensors, which are shared."""
    kind = type(value)
    if kind in _NUMBERS or kind is Tensor:
        return value
    if kind in (dict, OrderedDict):
        return kind((key, _taken(item)) for key, item in value.items())
    if kind in (list, tuple):
        return kind(map(_taken, value))
    return OwnState.of(value)


def _has_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_tensors, value))
    return isinstance(value, Tensor) or (isinstance(value, OwnState) and value.is_array)


def _put_back(now: Any, value: Any) -> Any:
    """The value, in the object that is there now if it can take it in: others may hold it too."""
    if isinstance(value, Tensor):
        return _written_into(now, value) if isinstance(now, Tensor) else value
    if isinstance(value, OwnState):
        return value.put_into(now)
    if type(now) is not type(value):
        return value
    if isinstance(value, dict):
        items = {key: _put_back(now.get(key), item) for key, item in value.items()}
        now.clear()
        now.update(items)
        return now
    if isinstance(value, list):
        old = [*now, *[None] * len(value)]
        now[:] = [_put_back(was, item) for was, item in zip(old, value, strict=False)]
        return now
    return value


@torch.no_grad()
def _written_into(now: Tensor, value: Tensor) -> Tensor:
    like = (value.shape, value.dtype, value.device)
    if type(now) is not Tensor or now.is_inference():
        return value
    return now.copy_(value) if like == (now.shape, now.dtype, now.device) else value
