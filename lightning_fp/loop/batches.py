"""Batches of any structure, with their floating-point tensors in another dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def with_dtype(batch: Any, dtype: torch.dtype) -> Any:
    """The same structure; what is no tensor of floating-point numbers stays as it is.

    Args:
        batch: tensors, also in mappings, lists, tuples, named tuples and dataclasses.
        dtype: of floating-point tensors.
    """
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    kind: Any = type(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return kind(*(with_dtype(item, dtype) for item in batch))
    if isinstance(batch, (list, tuple)):
        return kind(with_dtype(item, dtype) for item in batch)
    if isinstance(batch, Mapping):
        return kind({key: with_dtype(value, dtype) for key, value in batch.items()})
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [each.name for each in dataclasses.fields(batch) if each.init]
        changed = {name: with_dtype(getattr(batch, name), dtype) for name in fields}
        return dataclasses.replace(batch, **changed)
    return batch
