"""Batches of any structure: their tensors in another dtype, or where they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_fp.stability.keep.host_batch import copy_batch


def with_dtype(batch: Any, dtype: torch.dtype) -> Any:
    """The same structure with floating-point tensors in another dtype.

    Args:
        batch: tensors, also in mappings, lists, tuples, named tuples and dataclasses.
        dtype: of floating-point tensors.
    """
    return _mapped(batch, lambda x: x.to(dtype) if x.is_floating_point() else x)


def copied_to(batch: Any, device: str | None) -> Any:
    """A copy of a batch.

    Args:
        batch: in host memory.
        device: where its tensors are to be; None: they stay.
    """
    if device is None:
        return copy_batch(batch)
    if hasattr(batch, "to") and not isinstance(batch, Tensor):
        return copy_batch(batch).to(device)
    return _mapped(batch, lambda x: x.to(device).requires_grad_(x.requires_grad))


def device_of_batch(batch: Any) -> str | None:
    """Where the first tensor of a batch is, if not in host memory."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    first = tensors[0].device if tensors else getattr(batch, "device", None)
    on_device = isinstance(first, torch.device) and first.type != "cpu"
    return str(first) if on_device else None


def _mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    kind: Any = type(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return kind(*(_mapped(item, change) for item in batch))
    if isinstance(batch, (list, tuple)):
        return kind(_mapped(item, change) for item in batch)
    if isinstance(batch, Mapping):
        return kind({key: _mapped(value, change) for key, value in batch.items()})
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [each.name for each in dataclasses.fields(batch) if each.init]
        values = {name: _mapped(getattr(batch, name), change) for name in fields}
        return dataclasses.replace(batch, **values)
    return batch
