"""Rates with their intervals, by case and arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Row = Mapping[str, Any]

SAVED = 0.01
"""A run is saved if its final loss is at most this share above high precision's."""


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a rate (Wilson 1927)."""
    if not count:
        return (math.nan, math.nan)
    rate = hits / count
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + (z / (2 * count)) ** 2)
    return (max(0.0, centre - half), min(1.0, centre + half))


def rate(hits: int, count: int) -> str:
    """E.g. "9/10 [60%, 98%]"."""
    low, high = wilson(hits, count)
    return f"{hits}/{count} [{low:.0%}, {high:.0%}]"


def summary(
    rows: Sequence[Row], reference: Mapping[tuple[str, int], float], start: Mapping[str, int]
) -> dict[str, Any]:
    """What the runs of one case under one arm come to.

    Args:
        rows: they.
        reference: final loss of high precision by case and seed; none if nothing is to be saved.
        start: when the faults begin, by case.
    """
    known = [(row, reference.get((row["case"], row["seed"]))) for row in rows]
    gaps = [row["final_loss"] / high - 1 for row, high in known if high is not None]
    delays = [
        row["first_change"] - start[row["case"]] for row in rows if row["first_change"] is not None
    ]
    told: dict[str, Any] = {"runs": len(rows)}
    if gaps:
        finite = [gap if math.isfinite(gap) else math.inf for gap in gaps]
        told |= {"saved": sum(gap <= SAVED for gap in finite), "gap": median(finite)}
    return told | {
        "blamed": sum(map(blames, rows)),
        "delay": median(delays) if delays else None,
        "kept": sum(row["kept"] for row in rows) / len(rows),
        "replayed": sum(row["replayed"] for row in rows) / len(rows),
        "rolled_back": sum(row["rolled_back"] for row in rows) / len(rows),
        "skipped": sum(row["skipped"] for row in rows) / len(rows),
    }


def blames(row: Row) -> bool:
    """Whether the arm has blamed precision: some layer was given another format."""
    return bool(row["changed"]) or row["first_change"] is not None


def line(arm: str, told: Mapping[str, Any]) -> str:
    """One summary for people."""
    runs = told["runs"]
    text = f"  {arm:19}"
    if "saved" in told:
        text += f" saved {rate(told['saved'], runs):18} gap {told['gap']:+8.2%} "
    delay = "-" if told["delay"] is None else f"{told['delay']:.0f}"
    return (
        f"{text} blamed {rate(told['blamed'], runs):18} delay {delay:>3}"
        f"  left in its format {told['kept']:4.0%}"
        f"  replayed {told['replayed']:3.0f}, rolled back {told['rolled_back']:3.0f} steps"
    )
