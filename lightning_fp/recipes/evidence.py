"""Evidence: what was measured in a stage, and what its gates say to that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_fp.counting import counted
from lightning_fp.recipes.gate import Gate
from lightning_fp.statistic_names import called, measured

Series: TypeAlias = "tuple[tuple[int, float], ...]"
"""Values with the steps at which they were measured, oldest first."""

Answer = Literal["passed", "failed", "no data", "too early"]


@dataclass(frozen=True, kw_only=True)
class GateVerdict:
    """What one gate says now."""

    gate: Gate
    answer: Answer
    value: float = math.nan
    """What it was judged by; NaN if there was nothing."""

    def sentence(self) -> str:
        """E.g. "largest clamped mass of a layer is 3%, must be below 1% (worst of 100 steps)"."""
        gate, steps = self.gate, counted(self.gate.window, "step")
        if self.answer in ("no data", "too early"):
            return f"{called(gate.statistic)} was not measured in the last {steps}"
        limits = (("above", gate.above), ("below", gate.below))
        bounds = " and ".join(
            f"{name} {measured(gate.statistic, limit)}"
            for name, limit in limits
            if limit is not None
        )
        must = bounds if self.answer == "passed" else f"must be {bounds}"
        value = measured(gate.statistic, self.value)
        return f"{called(gate.statistic)} is {value}, {must} ({gate.reduce} of {steps})"


def extend(
    evidence: Mapping[str, Series], values: Mapping[str, Iterable[tuple[int, float]]], oldest: int
) -> dict[str, Series]:
    """Add what was measured, and forget what is too old.

    Args:
        evidence: what there is, by statistic.
        values: what is new; NaN stands for "nothing measured" and is left out.
        oldest: the first step that still counts.
    """
    extended = dict(evidence)
    for name, points in values.items():
        new = tuple(point for point in points if not math.isnan(point[1]))
        extended[name] = (*extended.get(name, ()), *new)
    return {
        name: tuple(point for point in series if point[0] >= oldest)
        if series and series[0][0] < oldest
        else series
        for name, series in extended.items()
    }


def judge(gate: Gate, evidence: Mapping[str, Series], *, step: int, lasted: int) -> GateVerdict:
    """What a gate says.

    Args:
        gate: the gate.
        evidence: what was measured in the stage, by statistic.
        step: optimizer steps so far.
        lasted: how many of them in the stage.
    """
    if lasted < gate.window:
        return GateVerdict(gate=gate, answer="too early")
    series = evidence.get(gate.statistic, ())
    values = [value for at, value in series if at > step - gate.window]
    if not values:
        return GateVerdict(gate=gate, answer="no data")
    value = gate.value(values)
    return GateVerdict(gate=gate, answer="passed" if gate.passes(value) else "failed", value=value)
