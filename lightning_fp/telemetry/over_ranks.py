"""Numbers over all ranks; to be called alike on all of them. One process alone is all there is."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the rank that writes and speaks."""
    return ranks() == 1 or dist.get_rank() == 0


def total(value: Tensor) -> Tensor:
    """The sum over ranks; a collective."""
    if ranks() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def mean(value: Tensor) -> Tensor:
    """The mean over ranks; a collective."""
    return total(value) / ranks() if ranks() > 1 else value


def any_rank(true: bool, device: torch.device) -> bool:
    """Whether it is so on any rank; a collective.

    Args:
        true: on this rank.
        device: where collectives run.
    """
    if ranks() == 1:
        return true
    return bool(total(torch.tensor(float(true), device=device)) > 0)
