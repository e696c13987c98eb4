"""Which signals tell of a failure some steps ahead, on seeds that had no say in how they are read.

A run that failed at step F is looked at k steps before, at F - k, and compared with all runs that
were well there and still were at F: at the same step of each, so that a signal gets no credit for
growing with time. A signal counts up or down as the other half of the seeds says: each half's
direction is judged on the other one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_fp.choices import check_at_least
from lightning_fp.study.auc import Comparison, auc, interval
from lightning_fp.study.predictor_runs import StudiedRun

WINDOW = 8
"""Steps up to the moment of prediction whose median is a signal's value: one step is noise."""

REFERENCES = ("lr", "grad_norm", "loss")
"""What a predictor has to be better than: what anybody sees without it."""


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """How well one signal predicts."""

    signal: str
    ahead: int
    """Steps before the failure."""

    auc: float | None
    """On held-out seeds; None where nothing can be compared."""

    low: float
    high: float
    """Ends of its 95% interval, by a bootstrap over runs."""

    direction: str
    """"up" or "down": what the signal does before a failure; "mixed" where the halves differ."""

    failures: int
    """Runs that failed and had the signal at that step."""

    pairs: int
    """Pairs of a run that failed and one that went on."""


@dataclass(frozen=True, kw_only=True)
class Predictors:
    """What a set of runs says."""

    runs: int
    failed: int
    seeds: int
    rows: tuple[Predictor, ...]
    """By steps ahead, the best first."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}


def predictors(
    runs: Sequence[StudiedRun], ahead: Sequence[int] = (5, 10, 20), *, seed: int = 0
) -> Predictors:
    """The AUC of each signal at predicting a failure.

    Args:
        runs: with their signals by step.
        ahead: how many steps before the failure to predict it.
        seed: of the bootstrap.

    Raises:
        ValueError: if there are fewer than two seeds, no run that failed, or none that did not.
    """
    for steps in ahead:
        check_at_least(1, ahead=steps)
    seeds = sorted({run.seed for run in runs})
    failed = [run for run in runs if run.failed_at is not None]
    if len(seeds) < 2:
        raise ValueError(
            f"runs must be of at least two seeds, got {len(seeds)}: a signal's direction is chosen"
            " on one half and judged on the other; sweep with --seeds 4 or more"
        )
    if not failed or len(failed) == len(runs):
        raise ValueError(
            f"of {len(runs)} runs {len(failed)} failed: there must be some that did and some that"
            " did not; sweep over learning rates on both sides of the edge"
        )
    halves = {value: index % 2 for index, value in enumerate(seeds)}
    names = dict.fromkeys(name for run in runs for name in run.signals)
    rows: list[Predictor] = []
    for steps in ahead:
        found = [_predictor(runs, halves, name, steps, seed) for name in names]
        rows += sorted(found, key=lambda row: -1.0 if row.auc is None else row.auc, reverse=True)
    return Predictors(runs=len(runs), failed=len(failed), seeds=len(seeds), rows=tuple(rows))


def _predictor(
    runs: Sequence[StudiedRun], halves: Mapping[int, int], name: str, ahead: int, seed: int
) -> Predictor:
    kept: list[Comparison] = []
    directions: set[str] = set()
    parts = [[i for i, run in enumerate(runs) if halves[run.seed] == half] for half in (0, 1)]
    for held_out, others in ((parts[0], parts[1]), (parts[1], parts[0])):
        learnt = auc(_comparisons(runs, others, name, ahead))
        judged = _comparisons(runs, held_out, name, ahead)
        if learnt is None or not judged:
            continue  # a half without a failure can say nothing of the direction
        down = learnt < 0.5
        directions.add("down" if down else "up")
        kept += [_negated(each) for each in judged] if down else judged
    used = {each.run for each in kept} | {run for each in kept for run in each.controls}
    low, high = interval(kept, sorted(used), seed)
    return Predictor(
        signal=name,
        ahead=ahead,
        auc=auc(kept),
        low=low,
        high=high,
        direction=directions.pop() if len(directions) == 1 else "mixed" if directions else "",
        failures=len(kept),
        pairs=sum(len(each.controls) for each in kept),
    )


def _comparisons(
    runs: Sequence[StudiedRun], among: Sequence[int], name: str, ahead: int
) -> list[Comparison]:
    """Each run that failed beside those that were well when it did."""
    found: list[Comparison] = []
    for index in among:
        failed_at = runs[index].failed_at
        if failed_at is None:
            continue
        moment = failed_at - ahead
        case = runs[index].value(name, moment, WINDOW)
        if case is None:
            continue
        controls: dict[int, float] = {}
        for other in among:
            end = runs[other].failed_at
            if other == index or (end is not None and end <= failed_at):
                continue
            value = runs[other].value(name, moment, WINDOW)
            if value is not None:
                controls[other] = value
        if controls:
            found.append(Comparison(run=index, case=case, controls=controls))
    return found


def _negated(each: Comparison) -> Comparison:
    controls = {run: -value for run, value in each.controls.items()}
    return Comparison(run=each.run, case=-each.case, controls=controls)
