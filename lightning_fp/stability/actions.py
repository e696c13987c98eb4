"""What the watch wants done: questions, and orders that are carried out.

Both between two optimizer steps, and alike on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning_fp.layers import LinearFormat
from lightning_fp.stability.questions import Question, ReplayStretch


@dataclass(frozen=True, kw_only=True)
class Write:
    """Give layers these formats."""

    formats: Mapping[str, LinearFormat]
    reason: str


@dataclass(frozen=True, kw_only=True)
class GoBack:
    """Go back to a snapshot."""

    start: int
    instead: ReplayStretch | None = None
    """Take over the end of this trajectory instead; None: the batches since are lost."""


@dataclass(frozen=True, kw_only=True)
class TakeSnapshot:
    """The run is sound: keep its state."""

    at: int
    keep_from: int | None = None
    """Of an open case: the newest snapshot from this step or before stays. None without one."""


@dataclass(frozen=True, kw_only=True)
class LookAgain:
    """Look at the casts of the next step too."""


@dataclass(frozen=True, kw_only=True)
class DropRecords:
    """Forget snapshots and batches: something happened since then that no replay repeats."""


Order: TypeAlias = Write | GoBack | TakeSnapshot | LookAgain | DropRecords

Action: TypeAlias = "Question[Any] | Order"
