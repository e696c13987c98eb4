"""Changes of format: those that wait for a step boundary, and those that took effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True)
class Write:
    """A change of format that waits for the next step boundary."""

    pattern: str
    format: str
    reason: str
    author: str = "user"


@dataclass(frozen=True, kw_only=True)
class Change:
    """One layer's format, changed."""

    layer: str
    before: str
    after: str
    reason: str

    author: str = "user"
    """Who wrote it: "user", "auto", "rollout", "fallback", "mismatch", "study"; "checkpoint"
    where a table is restored, "table" where it has widened somebody's write."""


Listener: TypeAlias = Callable[[Sequence[Change]], object]
"""Told the writes that took effect together."""
