"""What a format costs in the end: retries, the search for a rate that trains, rollbacks, replays.

A run is tried at the learning rate that is best for high precision. If it fails, what it has cost
is lost, and it is tried again: from another seed, or at the next lower rate of the sweep, whichever
is expected to be cheaper. What counts as done is a run whose loss, as a mean over a tenth of its
steps, comes within 1% of high precision's best; a rate at which most never do is no solution at any
speed. Costs are in runs.

With a share k of the steps in the format at a speed-up s, a step takes k / s + (1 - k), and replays
and rollbacks come on top. So the cost is A (k / s + c), and where it equals high precision's A_0 is
the break-even: the raw speed-up below which the format does not pay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeAlias

from lightning_fp.study.intervals import DRAWS, posterior_draws, quantile
from lightning_fp.study.sweep.findings import ALIKE, Findings, failed, first_below, loss_limit

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RatePrice:
    """What it costs to try a format at one learning rate."""

    failed: int
    runs: int

    lost: float
    """Share of its steps that a failed run has made."""

    steps: float
    """Steps until the loss is reached, as a share of a run; inf if it never is."""


@dataclass(frozen=True, kw_only=True)
class TotalCost:
    """What a format costs on this model, against high precision."""

    format: str
    setting: str
    reference: str

    attempts: float
    """Expected steps in whole runs, those lost among them."""

    reference_attempts: float
    """The same of high precision."""

    kept: float
    """Share of the layers' steps in the format."""

    besides: float
    """Steps replayed, for each that is made."""

    undone: float
    """Share of the steps that were rolled back or left out."""

    break_even: float
    """Raw speed-up from which on it pays; inf if none does."""

    low: float
    high: float
    """Its 95% interval."""

    def at(self, speedup: float) -> float:
        """Cost at a raw speed-up, as a share of high precision's.

        Args:
            speedup: of a step in the format over one in high precision.
        """
        step = self.kept / speedup + (1 - self.kept) + self.besides
        return self.attempts * step / (1 - self.undone) / self.reference_attempts

    def sentence(self, speedup: float | None = None) -> str:
        """The answer in a sentence.

        >>> cost = TotalCost(
        ...     format="fp8-dynamic", setting="", reference="bf16", attempts=1.1,
        ...     reference_attempts=1.0, kept=1.0, besides=0.0, undone=0.0, break_even=1.1,
        ...     low=1.0, high=1.3,
        ... )
        >>> cost.sentence()
        'fp8-dynamic pays above 1.10x raw speed-up on this model [1.00, 1.30].'

        Args:
            speedup: that was measured or predicted.
        """
        name = f"{self.format} ({self.setting})" if self.setting else self.format
        if math.isinf(self.break_even):
            why = (
                f"its runs fail or do not reach {self.reference}'s loss"
                if math.isinf(self.attempts)
                else "more is lost than any speed-up wins"
            )
            return f"{name} does not pay at any speed-up on this model: {why}."
        high = "no bound" if math.isinf(self.high) else f"{self.high:.2f}"
        text = (
            f"{name} pays above {self.break_even:.2f}x raw speed-up on this model"
            f" [{self.low:.2f}, {high}]"
        )
        if speedup is not None:
            text += f"; at {speedup:.2f}x a run costs {self.at(speedup):.2f} of {self.reference}'s"
        return f"{text}."


def total_costs(rows: Sequence[Row], findings: Findings) -> list[TotalCost]:
    """The cost of each format of a sweep beside high precision.

    Args:
        rows: of its cells.
        findings: from the same rows.
    """
    if findings.reference is None:
        return []
    costs: list[TotalCost] = []
    ran = [row for row in rows if row["error"] is None]
    for setting in dict.fromkeys(row["setting"] for row in ran):
        inside = [row for row in ran if row["setting"] == setting]
        own = (each for each in findings.formats if each.setting == setting)
        high = next((each for each in own if each.format == findings.reference), None)
        if high is None or high.best is None or high.best.final_loss is None:
            continue
        limit = loss_limit([row for row in inside if row["format"] == findings.reference])
        wanted = (1 + ALIKE) * high.best.final_loss
        prices = {
            format: _prices(inside, format, high.best.lr, limit, wanted, findings.steps)
            for format in dict.fromkeys(row["format"] for row in inside)
        }
        high_prices = prices[findings.reference]
        for format, own in prices.items():
            if format != findings.reference and not math.isinf(_attempts(high_prices)):
                runs = [row for row in inside if row["format"] == format]
                costs.append(_cost(format, setting, findings.reference, own, prices, runs))
    return costs


def expected_attempts(prices: Sequence[RatePrice], rates: Sequence[float]) -> float:
    """Expected steps until a run is done, in whole runs.

    Args:
        prices: of the learning rates to try, in order.
        rates: the failure rate at each.
    """
    cost = math.inf
    for price, failing in reversed(list(zip(prices, rates, strict=True))):
        if failing >= 1:
            cost += price.lost
            continue
        again = price.steps + failing / (1 - failing) * price.lost
        lower = (1 - failing) * price.steps + (failing * (price.lost + cost) if failing else 0.0)
        cost = min(again, lower)
    return cost


def _prices(
    rows: Sequence[Row], format: str, first: float, limit: float, wanted: float, steps: int
) -> list[RatePrice]:
    """The rates from the first one down."""
    prices: list[RatePrice] = []
    lrs = sorted({r["lr"] for r in rows if r["format"] == format and r["lr"] <= first})
    for lr in reversed(lrs):
        runs = [row for row in rows if row["format"] == format and row["lr"] == lr]
        bad = [row for row in runs if failed(row, limit)]
        good = [row for row in runs if not failed(row, limit)]
        prices.append(
            RatePrice(
                failed=len(bad),
                runs=len(runs),
                lost=fmean(row["steps"] / steps for row in bad) if bad else 1.0,
                steps=_steps(good, wanted, steps),
            )
        )
    return prices


def _steps(good: Sequence[Row], wanted: float, steps: int) -> float:
    """Whole runs until most have the loss that is wanted; a run that has it at the end is one."""
    if not good:
        return math.inf
    reached = sorted(first_below(row["curve"], wanted, steps) for row in good)
    middle = reached[(len(reached) - 1) // 2]
    return math.inf if math.isinf(middle) else 1.0


def _attempts(prices: Sequence[RatePrice]) -> float:
    return expected_attempts(prices, [price.failed / price.runs for price in prices])


def _cost(
    format: str,
    setting: str,
    reference: str,
    own: Sequence[RatePrice],
    prices: Mapping[str, Sequence[RatePrice]],
    runs: Sequence[Row],
) -> TotalCost:
    high = prices[reference]
    made = sum(row["steps"] for row in runs)
    kept = fmean(row["kept"] for row in runs)
    besides = sum(row["replayed"] for row in runs) / made
    undone = sum(row["rolled_back"] + row["skipped"] for row in runs) / made

    def break_even(attempts: float, reference_attempts: float) -> float:
        room = reference_attempts * (1 - undone) / attempts - (1 - kept) - besides
        return kept / room if room > 0 else math.inf

    attempts, against = _attempts(own), _attempts(high)
    many = len(own)
    drawn = sorted(
        break_even(expected_attempts(own, rates[:many]), expected_attempts(high, rates[many:]))
        for rates in posterior_draws([(price.failed, price.runs) for price in (*own, *high)], DRAWS)
    )
    value = break_even(attempts, against)
    return TotalCost(
        format=format,
        setting=setting,
        reference=reference,
        attempts=attempts,
        reference_attempts=against,
        kept=kept,
        besides=besides,
        undone=undone,
        break_even=value,
        low=min(value, quantile(drawn, 0.025)),
        high=max(value, quantile(drawn, 0.975)),
    )
