"""What the cells of a sweep say: how often a format fails, and over which learning rates it trains.

A run has failed if it diverged, or if at its end a tenth or more is missing of the way that the
reference has come at its best learning rate. The second half matters on small models, which seldom
blow up: too high a rate leaves them on a plateau, with a loss that is calm and useless.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, TypeAlias

from lightning_fp.study.intervals import posterior, wilson
from lightning_fp.study.sweep.verdict import closing_steps, curve_stretch

Row: TypeAlias = Mapping[str, Any]

MISSING = 0.1
"""Share of the reference's way, from its first to its final loss, that may not be missing."""

ALIKE = 0.01
"""A loss has reached the reference's if it is at most this share above it."""

_REFERENCES = ("bf16", "fp32", "fp16")
"""High precision, in the order in which it is asked for."""


@dataclass(frozen=True, kw_only=True)
class RateFindings:
    """The runs of one format at one learning rate."""

    lr: float
    runs: int
    failed: int
    diverged: int

    low: float
    high: float
    """95% interval of the failure rate (Wilson)."""

    spikes: float
    """Per 1,000 steps."""

    final_loss: float | None
    """Median over runs that end with a finite one."""

    gap: float | None
    """Median share by which the final loss is above the reference's at the same rate and seed."""

    @property
    def rate(self) -> float:
        """Share of the runs that failed."""
        return self.failed / self.runs


@dataclass(frozen=True, kw_only=True)
class FormatFindings:
    """All runs of one format under one setting of the further axes."""

    format: str
    setting: str
    rates: tuple[RateFindings, ...]
    """By learning rate, ascending."""

    width: float | None
    """Decades of the learning rate over which it trains: the integral of the share of runs that do
    not fail over log10 of the rate. None with a single rate."""

    width_low: float | None
    width_high: float | None
    """Its 95% interval."""

    narrower: float | None
    """By how many decades the range is narrower than the reference's."""

    narrower_low: float | None
    narrower_high: float | None
    """Its 95% interval; None for the reference."""

    best: RateFindings | None
    """At the rate with the lowest final loss of those at which at most half of the runs fail."""

    best_gap: float | None
    """By what share the final loss there is above the reference's at its own best rate."""

    steps_to_reference: float | None
    """Median steps until its loss at its best rate, as a mean over a tenth of the run, has come
    within 1% of the reference's final one; inf where most runs never do."""

    seconds_per_step: float
    """Median, of processor time."""

    curve: tuple[float | None, ...]
    """Median loss over seeds at the best rate, over equal stretches of the steps."""

    @property
    def runs(self) -> int:
        return sum(rate.runs for rate in self.rates)

    @property
    def failed(self) -> int:
        return sum(rate.failed for rate in self.rates)

    @property
    def name(self) -> str:
        """Format and setting."""
        return f"{self.format} ({self.setting})" if self.setting else self.format


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a sweep has found."""

    formats: tuple[FormatFindings, ...]
    reference: str | None
    """The format that the others are compared with; None if none is in high precision."""

    steps: int
    """Of a run."""

    errors: Mapping[str, str]
    """Why cells could not run, by their id."""


def find(rows: Sequence[Row], steps: int) -> Findings:
    """Read the table of cells.

    Args:
        rows: as `read_cells` gives them; those that could not run count nowhere.
        steps: planned of each run.
    """
    ran = [row for row in rows if row["error"] is None]
    formats = list(dict.fromkeys(row["format"] for row in ran))
    reference = reference_of(formats)
    found: list[FormatFindings] = []
    for setting in dict.fromkeys(row["setting"] for row in ran):
        inside = [row for row in ran if row["setting"] == setting]
        found += _of_setting(inside, formats, reference, steps)
    return Findings(
        formats=tuple(found),
        reference=reference,
        steps=steps,
        errors={row["id"]: row["error"] for row in rows if row["error"] is not None},
    )


def reference_of(formats: Collection[str]) -> str | None:
    """The format that others are compared with; None if none is in high precision."""
    return next((name for name in _REFERENCES if name in formats), None)


def failed(row: Row, limit: float) -> bool:
    """Whether a run has failed.

    Args:
        row: of it.
        limit: the highest final loss that will do.
    """
    return bool(row["diverged"]) or row["final_loss"] is None or row["final_loss"] > limit


def loss_limit(rows: Sequence[Row]) -> float:
    """The highest final loss that will do, given the runs of the reference; inf without any."""
    by_rate = _by_rate(rows)
    finals = [_median(row["final_loss"] for row in runs) for runs in by_rate.values()]
    best = min((loss for loss in finals if loss is not None), default=None)
    first = _median(row["first_loss"] for row in rows)
    if best is None or first is None:
        return math.inf
    return best + MISSING * max(0.0, first - best)


def _of_setting(
    rows: Sequence[Row], formats: Sequence[str], reference: str | None, steps: int
) -> list[FormatFindings]:
    ours = [row for row in rows if row["format"] == reference]
    limit = loss_limit(ours)
    paired = {(row["lr"], row["seed"]): row["final_loss"] for row in ours}
    target = _best(_rates(ours, limit, paired))
    found: list[FormatFindings] = []
    for format in formats:
        runs = [row for row in rows if row["format"] == format]
        if not runs:
            continue
        rates = _rates(runs, limit, paired)
        best = _best(rates)
        at_best = [row for row in runs if best is not None and row["lr"] == best.lr]
        against = None if format == reference else _rates(ours, limit, paired)
        gap = None
        if best is not None and target is not None and best.final_loss and target.final_loss:
            gap = best.final_loss / target.final_loss - 1
        found.append(
            FormatFindings(
                format=format,
                setting=runs[0]["setting"],
                rates=tuple(rates),
                **_width(rates),
                **_narrower(rates, against),
                best=best,
                best_gap=gap,
                steps_to_reference=_steps_to(at_best, target, steps),
                seconds_per_step=median(row["cpu_seconds"] / row["steps"] for row in runs),
                curve=_curve(at_best),
            )
        )
    return found


def _rates(
    rows: Sequence[Row], limit: float, paired: Mapping[tuple[float, int], float | None]
) -> list[RateFindings]:
    found: list[RateFindings] = []
    for lr, runs in _by_rate(rows).items():
        bad = sum(failed(row, limit) for row in runs)
        low, high = wilson(bad, len(runs))
        gaps = [
            row["final_loss"] / other - 1
            for row in runs
            if row["final_loss"] is not None
            and (other := paired.get((lr, row["seed"]))) is not None
        ]
        found.append(
            RateFindings(
                lr=lr,
                runs=len(runs),
                failed=bad,
                diverged=sum(bool(row["diverged"]) for row in runs),
                low=low,
                high=high,
                spikes=1000
                * fmean(row["spikes"] for row in runs)
                / fmean(row["steps"] for row in runs),
                final_loss=_median(row["final_loss"] for row in runs),
                gap=_median(gaps),
            )
        )
    return found


def _best(rates: Sequence[RateFindings]) -> RateFindings | None:
    known = [rate for rate in rates if rate.final_loss is not None and rate.rate <= 0.5]
    return min(known, key=lambda rate: rate.final_loss or math.inf, default=None)


def stable_decades(lrs: Sequence[float], failing: Sequence[float]) -> float:
    """The integral of what does not fail over log10 of the learning rate (trapezoids).

    >>> stable_decades([1e-3, 1e-2, 1e-1], [0.0, 0.0, 1.0])
    1.5

    Args:
        lrs: learning rates, ascending.
        failing: the failure rate at each.
    """
    at = [math.log10(lr) for lr in lrs]
    pairs = zip(at, at[1:], failing, failing[1:], strict=False)
    return sum((b - a) * (1 - (p + q) / 2) for a, b, p, q in pairs)


def _width(rates: Sequence[RateFindings]) -> dict[str, float | None]:
    names = ("width", "width_low", "width_high")
    if len(rates) < 2:
        return dict.fromkeys(names)
    lrs = [rate.lr for rate in rates]
    width = stable_decades(lrs, [rate.rate for rate in rates])
    counts = [(rate.failed, rate.runs) for rate in rates]
    low, high = posterior(counts, lambda drawn: stable_decades(lrs, drawn))
    return dict(zip(names, (width, low, high), strict=True))


def _narrower(
    rates: Sequence[RateFindings], against: Sequence[RateFindings] | None
) -> dict[str, float | None]:
    names = ("narrower", "narrower_low", "narrower_high")
    lrs = [rate.lr for rate in rates]
    if against is None or len(rates) < 2 or lrs != [rate.lr for rate in against]:
        return dict.fromkeys(names)

    def difference(failing: Sequence[float]) -> float:
        half = len(lrs)
        return stable_decades(lrs, failing[half:]) - stable_decades(lrs, failing[:half])

    both = [*rates, *against]
    low, high = posterior([(rate.failed, rate.runs) for rate in both], difference)
    value = difference([rate.rate for rate in both])
    return dict(zip(names, (value, low, high), strict=True))


def _steps_to(rows: Sequence[Row], target: RateFindings | None, steps: int) -> float | None:
    if target is None or target.final_loss is None or not rows:
        return None
    wanted = (1 + ALIKE) * target.final_loss
    return median(first_below(row["curve"], wanted, steps) for row in rows)


def first_below(curve: Sequence[float | None], wanted: float, steps: int) -> float:
    """Steps until a cell's loss has come down to another; inf if it never does.

    What must have come down is the trailing mean over a tenth of the run. The loss that is wanted
    is a mean over as many steps, so both have the same noise, and the run that it is of gets there
    by its end; of such a mean, a lucky batch or a stretch of them is a small part.

    Args:
        curve: see `verdict.curve_stretch`.
        wanted: the loss.
        steps: planned of the run.
    """
    stretch = curve_stretch(steps)
    window = max(1, closing_steps(steps) // stretch)
    for end in range(window, len(curve) + 1):
        losses = [loss for loss in curve[end - window : end] if loss is not None]
        if len(losses) == window and fmean(losses) <= wanted:
            return float(min(steps, end * stretch))
    return math.inf


def _curve(rows: Sequence[Row]) -> tuple[float | None, ...]:
    longest = max((len(row["curve"]) for row in rows), default=0)
    return tuple(
        _median(row["curve"][i] for row in rows if i < len(row["curve"])) for i in range(longest)
    )


def _by_rate(rows: Sequence[Row]) -> dict[float, list[Row]]:
    lrs = sorted({row["lr"] for row in rows})
    return {lr: [row for row in rows if row["lr"] == lr] for lr in lrs}


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
