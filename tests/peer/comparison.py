"""What of a suite's results is ours: what fails with our plugin and passes without."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tests.peer.suite import ARMS, PLAIN, Arm, Result

BAD = ("failed", "died")
KNOWN = (
    ("lightning_fp.precision", "the checkpoint's extra key"),
    ("FPLinear", "the layer's format in what is printed of it"),
    ("left artifacts behind", "the records of the run"),
    ("callbacks.run.run.Run", "the callback that keeps the run's records"),
    ("precision_fallback.PrecisionFallback object", "the fallback, which the runner adds"),
)
"""What a message tells of a difference that is meant to be."""

KNOWN_TESTS = (
    ("models/test_hooks.py", "the checkpoint's extra key"),
    ("test_multiple_pruning_callbacks", "the layer's format in what is printed of it"),
)
"""Tests of which the message does not tell; `high` has no such key and no such format."""


def compared(results: Mapping[str, Mapping[str, Result]]) -> list[dict[str, Any]]:
    """One row for each arm but the plain one.

    Args:
        results: by arm, then by test.
    """
    plain = results.get(PLAIN, {})
    found: list[dict[str, Any]] = []
    for arm in ARMS:
        own = {t: r for t, r in results.get(arm.name, {}).items() if r.outcome != "skipped"}
        own = {t: r for t, r in own.items() if r.trainers or r.outcome == "died"}
        if arm.name == PLAIN or not own:
            continue
        bad = [r for r in own.values() if r.outcome in BAD]
        plain_too = {r.test for r in bad if r.test in plain and plain[r.test].outcome in BAD}
        differ = sorted((r for r in bad if r.test not in plain_too), key=lambda r: r.test)
        high = results.get(arm.name.replace(arm.format, "high"), {})
        found.append(
            {
                "name": arm.name,
                "tests": len(own),
                "passed": len(own) - len(bad),
                "failed_plain_too": len(plain_too),
                "differ": len(differ),
                "differences": [
                    {"test": r.test, "reason": reason(arm, r, high.get(r.test))} for r in differ
                ],
            }
        )
    return found


def reason(arm: Arm, result: Result, under_high: Result | None) -> str:
    """Why a test differs, as far as its message and the arm of the format `high` tell."""
    known = [why for name, why in KNOWN_TESTS if name in result.test and arm.format != "high"]
    known += [why for word, why in KNOWN if word in result.message]
    if known:
        return known[0]
    compared = result.message.startswith(("AssertionError", "assert ")) or "close" in result.message
    high_passes = under_high is not None and under_high.outcome == "passed"
    if arm.format != "high" and high_passes and compared:
        return "rounding, which vanishes under `high`"
    words = re.sub(r"\s+", " ", result.message or result.outcome).split(" + where")[0]
    return re.sub(r"(?<=\s|')/[\w/.\-]+/", "", words)[:120].replace("|", "/")
