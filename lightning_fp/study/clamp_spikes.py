"""Which layers' clamping comes with the loss spikes of a run, and is it more than chance?"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lightning_fp.argument_types import checked
from lightning_fp.choices import check_at_least
from lightning_fp.counting import counted
from lightning_fp.records.jsonl import plain
from lightning_fp.records.loss import Loss
from lightning_fp.study.alignment import (
    Correction,
    corrected,
    event_average,
    shift_p_value,
    shifted_scores,
)
from lightning_fp.study.series import ClampSeries, Statistic, clamp_series
from lightning_fp.study.spikes import Spike, SpikeRule, armed_step, find_spikes


@dataclass(frozen=True, kw_only=True)
class Tie:
    """One operand's clamping around the loss spikes."""

    layer: str
    operand: str
    p_value: float
    """How often the spikes, shifted along the run, meet as much clamping; 1 without spikes."""

    p_corrected: float
    """The same, corrected for all operands looked at: the one to judge by."""

    score: float
    """Mean rank of the largest clamping up to each spike, in standard deviations over shifts."""

    before: float
    """Mean of the statistic over the window up to the spikes and at them; NaN if unknown."""

    elsewhere: float
    """Mean outside of all windows; NaN if unknown."""

    samples: int
    """Measurements that `before` rests on."""

    curve: tuple[float, ...]
    """Average from `window` steps before a spike to `window` steps after; NaN where unknown."""


@dataclass(frozen=True, kw_only=True)
class ClampSpikes:
    """Clamping around the loss spikes of a run."""

    statistic: Statistic
    correction: Correction
    window: int
    begin: int
    """First step looked at."""

    end: int
    """Last step looked at."""

    resolution: int
    """Steps that one row of the statistics covers."""

    spikes: tuple[Spike, ...]
    outside: int
    """Further spikes, at steps that have no statistics."""

    silent: int
    """Operands that never clamped; they are no part of the test."""

    ties: tuple[Tie, ...]
    """Of every operand that clamped, the closest tie first."""

    def significant(self, alpha: float = 0.05) -> list[Tie]:
        """The ties that are hardly by chance: with a corrected p-value below `alpha`."""
        return [tie for tie in self.ties if tie.p_corrected < alpha]

    def layers(self) -> list[str]:
        """The layers that clamped, the suspect first."""
        return list(dict.fromkeys(tie.layer for tie in self.ties))

    def summary(self) -> str:
        """What was found, in a sentence."""
        where = f"between steps {self.begin} and {self.end}"
        if not self.spikes:
            return f"The loss has no spikes {where}: there is nothing to explain."
        count = f"{len(self.spikes)} loss spike{'s' if len(self.spikes) > 1 else ''} {where}"
        if not self.ties:
            return f"{count}, but nothing clamped: the cause is another."
        best, found = self.ties[0], self.significant()
        if not found:
            return (
                f"{count}; no layer's clamping is tied to them beyond chance (the closest is"
                f" {best.layer}, {best.operand}: corrected p = {best.p_corrected:.2g})."
            )
        layers = list(dict.fromkeys(tie.layer for tie in found))
        more = f", and {counted(len(layers) - 1, 'more layer')}" if len(layers) > 1 else ""
        return (
            f"{count}; clamping in {best.layer} ({best.operand}) comes with them"
            f" (corrected p = {best.p_corrected:.2g}){more}. Whether it is the cause, an A/B tells."
        )

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON: null for what is unknown."""
        return plain({**asdict(self), "summary": self.summary()})


@checked
def clamp_spikes(
    statistics: pa.Table,
    loss: Loss,
    *,
    statistic: Statistic = "clamped_mass",
    window: int = 8,
    rule: SpikeRule = SpikeRule(),  # noqa: B008 (frozen)
    correction: Correction = "max",
    begin: int = 0,
) -> ClampSpikes:
    """Average each operand's clamping around the loss spikes, and test the tie.

    What counts is the largest clamping up to `window` steps before a spike and at it: what comes
    later cannot be its cause. Its mean rank is compared with the same for all circular shifts of
    the spikes along the run.

    Args:
        statistics: what `lightning_fp.records.read_statistics` returned.
        loss: the run's loss, best of every step.
        statistic: "clamped_mass", measured on sampled steps; or "overflow_bits", by how much the
            largest value went beyond the range, which under delayed scaling no step escapes.
        window: steps before and after a spike to look at.
        rule: what counts as a spike.
        correction: how p-values are corrected for the number of operands.
        begin: steps up to this one are left out, e.g. a warm-up, in which both are frequent.

    Raises:
        ValueError: for an option out of range, missing columns or rows, or a loss and statistics
            that share no steps.
    """
    check_at_least(0, window=window)
    series = clamp_series(statistics, statistic)
    armed = armed_step(loss, rule)
    first = max(begin, int(series.begins[0]) + 1, int(loss.steps[0]) if armed is None else armed)
    last = min(int(series.ends[-1]), int(loss.steps[-1]))
    if first > last:
        raise ValueError(
            f"loss and statistics must share steps after begin={begin}; the loss has steps"
            f" {int(loss.steps[0])} to {int(loss.steps[-1])}, the statistics"
            f" {int(series.begins[0]) + 1} to {int(series.ends[-1])}"
        )
    found = find_spikes(loss, rule)
    spikes = tuple(spike for spike in found if first <= spike.step <= last)
    steps = torch.arange(first, last + 1)
    events = torch.tensor([spike.step - first for spike in spikes], dtype=torch.int64)
    return ClampSpikes(
        statistic=statistic,
        correction=correction,
        window=window,
        begin=first,
        end=last,
        resolution=series.resolution,
        spikes=spikes,
        outside=len(found) - len(spikes),
        silent=series.silent,
        ties=_ties(series, steps, events, window, correction),
    )


def _ties(
    series: ClampSeries, steps: Tensor, events: Tensor, window: int, correction: Correction
) -> tuple[Tie, ...]:
    interval = series.interval_of(steps)
    around = events.unsqueeze(1) + torch.arange(-window, window + 1)
    inside = torch.zeros(len(steps), dtype=torch.bool)
    inside[around.clamp(0, len(steps) - 1)] = True
    leading = around[:, : window + 1].clamp(min=0)
    intervals = interval[leading].unique()

    largest = torch.full((len(steps),), -torch.inf, dtype=torch.float64)
    p_values = torch.ones(len(series.keys), dtype=torch.float64)
    scores = torch.full_like(p_values, torch.nan)
    ties: list[Tie] = []
    for index, (layer, operand) in enumerate(series.keys):
        values = series.values[index][interval]
        if len(events):
            shifted = shifted_scores(values, events, window)
            p_values[index], scores[index] = shift_p_value(shifted), shifted[0]
            largest = torch.fmax(largest, shifted)
        tie = Tie(
            layer=layer,
            operand=operand,
            p_value=float(p_values[index]),
            p_corrected=1.0,
            score=float(scores[index]),
            before=float(values[leading].nanmean()),
            elsewhere=float(values[~inside].nanmean()),
            samples=int(series.samples[index][intervals].sum()),
            curve=tuple(event_average(values, events, window).tolist()),
        )
        ties.append(tie)
    judged = corrected(p_values, scores, largest, correction).tolist()
    ties = [Tie(**{**vars(tie), "p_corrected": p}) for tie, p in zip(ties, judged, strict=True)]
    return tuple(sorted(ties, key=_closeness))


def _closeness(tie: Tie) -> tuple[float, float, str, str]:
    score = -math.inf if math.isnan(tie.score) else tie.score
    return tie.p_corrected, -score, tie.layer, tie.operand
