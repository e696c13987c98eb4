"""The built-in recipes as a list has them, which costs no import: a line each, and their stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Listed(NamedTuple):
    """What a list says of a recipe."""

    description: str
    stages: tuple[str, ...]


CATALOGUE: Mapping[str, Listed] = {
    "conservative": Listed(
        "One block, then all but the ends, then everything, each behind gates.",
        ("high", "one-block", "all-but-ends", "all", "cooldown"),
    ),
    "balanced": Listed(
        "High precision, all but the first and last block, then everything.",
        ("high", "all-but-ends", "all"),
    ),
    "aggressive": Listed("Everything after a few steps; back if casts clamp.", ("high", "all")),
    "first-last-bf16": Listed(
        "The first and the last block in high precision all the time.", ("ends-high",)
    ),
    "bf16-cooldown": Listed(
        "Low precision first, high precision for the last part.", ("low", "cooldown")
    ),
    "delayed-after-dynamic": Listed(
        "Delayed scaling where it would not have clamped, and never for too long.",
        ("dynamic", "delayed", "dynamic-again"),
    ),
    "fp16-rl": Listed("FP16 while training and inference agree.", ("bf16", "fp16")),
}
"""By name, in the order of the list."""
