"""Numbers over all ranks; to be called alike on all of them. One process alone is all there is."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fp.rank_group import current_group, ranks


def total(value: Tensor) -> Tensor:
    """The sum over ranks; a collective."""
    if ranks() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value, group=current_group())
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
