"""The ranks that train together: all that there are, unless a loop is given a group of them.

Every reduction of numbers that all of them share goes over this group. Reductions of one layer's
parts have the group of their mesh.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

_GROUP: ContextVar[ProcessGroup | None] = ContextVar("group", default=None)


@contextmanager
def among(group: ProcessGroup | None) -> Generator[None, None, None]:
    """Within, the ranks of a group train together.

    Args:
        group: that this process is in; None: all ranks.
    """
    token = _GROUP.set(group)
    try:
        yield
    finally:
        _GROUP.reset(token)


def current_group() -> ProcessGroup | None:
    """What collectives take as their group."""
    return _GROUP.get()


def ranks() -> int:
    """How many there are; 1 where nothing is distributed."""
    there = dist.is_available() and dist.is_initialized()
    return dist.get_world_size(_GROUP.get()) if there else 1


def is_first() -> bool:
    """Whether this is the rank that writes and speaks."""
    return ranks() == 1 or dist.get_rank(_GROUP.get()) == 0
