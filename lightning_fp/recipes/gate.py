"""Gate: what must hold before a rollout may go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, get_args

from lightning_fp.argument_types import pythons_own
from lightning_fp.choices import check_choice
from lightning_fp.shown import shown

Reduce = Literal["worst", "max", "min", "mean", "last", "sum"]

_REDUCE: Mapping[str, Callable[[Sequence[float]], float]] = {
    "max": max,
    "min": min,
    "mean": fmean,
    "last": lambda values: values[-1],
    "sum": math.fsum,
}


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A bound on a statistic over the last steps of a stage."""

    statistic: str
    """What is measured: "clamped_mass/max", "underflow/max", "sqnr_db/min", "headroom_bits/min",
    another column of ClampMonitor's rows with max, min or mean, "parity/loss_gap",
    "parity/grad_cosine", "fallbacks", "loss", "loss_gap", "eval_gap", or any name that the module
    logs."""

    below: float | None = None
    """The gate passes only if the statistic is less than this."""

    above: float | None = None
    """The gate passes only if the statistic is more than this."""

    window: int = 100
    """Steps that it looks back, at most to the beginning of the stage; it is judged when so many
    have passed in the stage."""

    reduce: Reduce = "worst"
    """What is made of the values in the window: "worst" wants every one of them within bounds."""

    def __post_init__(self) -> None:
        if not isinstance(self.statistic, str) or not self.statistic.strip():
            raise ValueError(
                "gate: statistic must be a name such as 'clamped_mass/max', got"
                f" {shown(self.statistic)}"
            )
        for field in ("below", "above", "window"):
            object.__setattr__(self, field, pythons_own(getattr(self, field)))
        for field in ("below", "above"):
            value = getattr(self, field)
            if value is not None and not is_number(value):
                raise ValueError(f"{self}: {field} must be a finite number, got {shown(value)}")
        if self.below is None and self.above is None:
            raise ValueError(f"{self}: below or above must be given, got neither")
        if self.below is not None and self.above is not None and self.below <= self.above:
            raise ValueError(
                f"{self}: below must be more than above, got below={self.below!r} and"
                f" above={self.above!r}; no value passes"
            )
        if not is_count(self.window):
            raise ValueError(
                f"{self}: window must be an integer of at least 1, got {shown(self.window)}"
            )
        check_choice(f"{self}: reduce", self.reduce, get_args(Reduce))

    def __str__(self) -> str:
        return f"gate {self.statistic!r}"

    @property
    def bounds(self) -> str:
        """E.g. "below 0.01" or "above 0.9 and below 1.1"."""
        bounds = (("above", self.above), ("below", self.below))
        return " and ".join(f"{name} {value:g}" for name, value in bounds if value is not None)

    def passes(self, value: float) -> bool:
        """Whether one value is within the bounds; NaN is not."""
        return (self.below is None or value < self.below) and (
            self.above is None or value > self.above
        )

    def value(self, values: Sequence[float]) -> float:
        """What the gate makes of the values of its window.

        Args:
            values: at least one, oldest first.
        """
        if self.reduce != "worst":
            return _REDUCE[self.reduce](values)
        outside = [value for value in values if not self.passes(value)]
        if outside:
            return outside[-1]
        return max(values) if self.above is None else min(values)


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object) -> bool:
    """Whether it is an integer of at least 1, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
