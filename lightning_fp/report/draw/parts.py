"""What a page is made of: sections of charts and tables, as plain data for the template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Chart: TypeAlias = Mapping[str, Any]
"""What charts.js draws: "type" is "panels", "strips", "heatmap" or "rates"; all have "title" and
"look". A "table" in it is shown beneath."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    numbers: frozenset[int] = frozenset()
    """Columns that are aligned on the right."""

    note: str = ""
    """Beneath it."""

    folded: bool = False
    """Whether it shows only when asked for."""

    long: bool = False
    """Whether it does so on a phone."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One question about a run, and its answer."""

    id: str
    title: str

    look: str
    """A sentence of what to look at."""

    charts: Sequence[Chart] = ()

    small: bool = False
    """Whether the charts stand beside each other where there is room."""

    tables: Sequence[Table] = ()

    facts: Sequence[tuple[str, str]] = ()
    """What, and how much."""

    missing: str = ""
    """What to do that there is something here next time; else empty."""

    text: Sequence[str] = field(default_factory=tuple[str, ...])
    """Sentences."""


def not_recorded(remedy: str) -> str:
    """What stands in a section without records."""
    return f"Not recorded: {remedy}."


def number(value: float | None, form: str = ".4g") -> str:
    """A number, or nothing."""
    return "" if value is None or math.isnan(value) else f"{value:{form}}"


def decibels(value: float | None) -> str:
    """A ratio in decibels; of one that is endless that nothing was lost."""
    if value is None or math.isnan(value):
        return ""
    return "lossless" if value >= 149.9 else f"{value:.1f} dB"


def duration(seconds: float | None) -> str:
    """A time as people say it.

    >>> duration(0.0123), duration(75), duration(7300)
    ('12.3 ms', '1 min 15 s', '2 h 1 min')
    """
    if seconds is None or math.isnan(seconds):
        return "unknown"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def size(value: float) -> str:
    """Bytes as people say them.

    >>> size(1024), size(4.9e6)
    ('1.0 KiB', '4.7 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
