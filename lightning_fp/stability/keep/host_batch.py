"""A batch in host memory, out of reach of what a training step writes into its own."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
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
        batch: tensors, also in dicts, lists, tuples, named tuples, dataclasses, numpy arrays, and
            objects that have `.to`. Anything else is kept as it is.

    Returns:
        The same structure.
    """
    if isinstance(batch, Tensor):
        return _tensor_copy(batch)
    kind: Any = type(batch)
    if kind in (list, tuple):
        return kind(map(host_copy, batch))
    if hasattr(batch, "to"):
        # A copy first, because some change in place; their own, if they have one, is cheaper.
        clone: Callable[[], Any] | None = getattr(batch, "clone", None)
        return (clone() if callable(clone) else copy.deepcopy(batch)).to("cpu")
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return kind(*map(host_copy, batch))
    if isinstance(batch, MutableMapping):
        copied: Any = copy.copy(batch)
        for key, value in batch.items():
            copied[key] = host_copy(value)
        return copied
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        copied = copy.copy(batch)  # no __init__, which may have its own idea
        for each in dataclasses.fields(batch):
            object.__setattr__(copied, each.name, host_copy(getattr(batch, each.name)))
        return copied
    return copy.copy(batch) if _is_array(batch) else batch


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


def _tensor_copy(tensor: Tensor) -> Tensor:
    plain = type(tensor) is Tensor and tensor.layout is torch.strided
    if tensor.is_cuda and plain:
        copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copied.copy_(tensor.detach(), non_blocking=True)
    else:
        copied = tensor.detach().to("cpu", copy=True)
    return copied.requires_grad_() if tensor.requires_grad else copied


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)
