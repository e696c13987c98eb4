"""The resume rule: where a run went back, what it wrote from there on replaces what was there.

Steps alone decide here. `events.jsonl` also knows what a checkpoint had seen of a step's events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def in_force(steps: Sequence[float] | Tensor) -> Tensor:
    """Which rows no later one replaces, as one of their step or before it does.

    >>> in_force([1, 2, 3, 2]).tolist()
    [True, False, False, True]

    Args:
        steps: [rows], in the order they were written.

    Returns:
        bool [rows].
    """
    at = torch.as_tensor(steps, dtype=torch.float64)
    later = torch.full_like(at, torch.inf)
    later[:-1] = at.flip(0).cummin(0).values.flip(0)[1:]
    return at < later


def rows_in_force(rows: Sequence[T], step: Callable[[T], int]) -> list[T]:
    """The rows that count; `step` tells that of each."""
    return list(compress(rows, in_force([step(row) for row in rows]).tolist()))
