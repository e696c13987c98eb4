"""A batch in host memory, out of reach of what a training step writes into its own.

A batch may be anything that a `collate_fn` returns. What is not recognised is kept as it is, which
is right for what no step writes into, such as text and settings.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence
from typing import Any

import torch
from torch import Tensor

_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))
_OBJECT = 64
"""Bytes counted for an object that does not say."""

_DEPTH = 4
"""How deep objects are looked into for the tensors they hold."""


def host_copy(batch: Any) -> Any:
    """A copy of a batch on the CPU.

    From CUDA into pinned memory, asynchronously: wait for the device before reading it there.

    Args:
        batch: tensors, also in dicts and other mappings, lists, tuples, named tuples, dataclasses,
            numpy arrays, and objects that have `.to` or hold tensors. Anything else is kept as it
            is.

    Returns:
        The same structure.
    """
    return _copy(batch, _on_host, lambda moved: moved.to("cpu"))


def copy_batch(batch: Any) -> Any:
    """A copy of a batch where it is; see `host_copy`."""
    return _copy(batch, _clone, lambda same: same)


def _copy(batch: Any, leaf: Callable[[Tensor], Tensor], move: Callable[[Any], Any]) -> Any:
    if isinstance(batch, Tensor):
        return leaf(batch)
    kind: Any = type(batch)
    copied: Any
    if kind in (list, tuple):
        return kind(_copy(item, leaf, move) for item in batch)
    # Before named tuples and mappings, which a PackedSequence and a tokenizer's batch are besides:
    # what has a `to` of its own knows best how it is moved.
    if hasattr(batch, "to"):
        # A copy first, because some change in place; their own, if they have one, is cheaper.
        clone: Callable[[], Any] | None = getattr(batch, "clone", None)
        return move(clone() if callable(clone) else copy.deepcopy(batch))
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return kind(*(_copy(item, leaf, move) for item in batch))
    if isinstance(batch, MutableSequence) and not isinstance(batch, bytearray):
        copied = copy.copy(batch)
        copied[:] = [_copy(item, leaf, move) for item in batch]
        return copied
    if isinstance(batch, MutableMapping):
        copied = copy.copy(batch)
        for key, value in batch.items():
            copied[key] = _copy(value, leaf, move)
        return copied
    if isinstance(batch, Mapping):
        return kind({key: _copy(value, leaf, move) for key, value in batch.items()})
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        copied = copy.copy(batch)  # no __init__, which may have its own idea
        for each in dataclasses.fields(batch):
            value = _copy(getattr(batch, each.name), leaf, move)
            object.__setattr__(copied, each.name, value)
        return copied
    if _is_array(batch):
        return copy.copy(batch)
    return copy.deepcopy(batch) if _holds_tensors(batch) else batch


def _holds_tensors(value: Any) -> bool:
    """Whether an object of a user's own class is a batch by its attributes."""
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    return any(isinstance(item, Tensor) for item in vars(value).values())


def batch_bytes(batch: Any, depth: int = _DEPTH) -> int:
    """Bytes that a copy of a batch takes in host memory; of objects as far as can be seen."""
    if isinstance(batch, Tensor):
        nbytes = batch.numel() * batch.element_size()
        # The allocator of pinned memory rounds up to powers of two.
        return 1 << (nbytes - 1).bit_length() if batch.is_cuda and nbytes else nbytes
    if isinstance(batch, (str, bytes)):
        return sys.getsizeof(batch)
    if _is_array(batch):
        return batch.nbytes
    if isinstance(batch, Mapping):
        return _OBJECT + sum(batch_bytes(value, depth) for value in batch.values())
    if isinstance(batch, (list, tuple)):
        return _OBJECT + sum(batch_bytes(value, depth) for value in batch)
    if depth and type(batch) not in _PLAIN and hasattr(batch, "__dict__"):
        return _OBJECT + batch_bytes(vars(batch), depth - 1)
    return _OBJECT


def is_plain_batch(batch: Any) -> bool:
    """Whether a checkpoint with it loads with `weights_only=True`."""
    kind = type(batch)
    if kind in (dict, OrderedDict):
        return all(type(key) in _PLAIN and is_plain_batch(value) for key, value in batch.items())
    if kind in (list, tuple):
        return all(map(is_plain_batch, batch))
    return kind in _PLAIN or kind is Tensor


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _on_host(tensor: Tensor) -> Tensor:
    plain = type(tensor) is Tensor and tensor.layout is torch.strided
    if tensor.is_cuda and plain:
        # Only a copy into pinned memory lets the host go on at once.
        copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copied.copy_(tensor.detach(), non_blocking=True)
    else:
        copied = tensor.detach().to("cpu", copy=True)
    return copied.requires_grad_() if tensor.requires_grad else copied


def _is_array(value: Any) -> bool:
    # Nobody has an array where numpy is not loaded.
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)
