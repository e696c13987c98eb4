"""How well a number tells runs that will fail from runs that will not."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DRAWS = 1000
"""Of the bootstrap: the ends of a 95% interval are then known to about 3% of its width."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A run that failed beside those that went on, all at the same step."""

    run: int
    """Which run failed."""

    case: float
    """Its number."""

    controls: Mapping[int, float]
    """The numbers of those that went on, by run."""


def auc(comparisons: Sequence[Comparison], times: Mapping[int, int] | None = None) -> float | None:
    """Share of the pairs in which the run that failed has the larger number; ties count half.

    >>> auc([Comparison(run=0, case=2.0, controls={1: 0.5, 2: 2.0, 3: 1.0})])
    0.8333333333333334

    Args:
        comparisons: any number; only runs at the same step are compared.
        times: how often each run counts; None: once.

    Returns:
        0.5 where the number tells nothing; None where there is no pair.
    """
    won = pairs = 0.0
    for each in comparisons:
        own = 1 if times is None else times.get(each.run, 0)
        if not own:
            continue
        for run, value in each.controls.items():
            weight = own if times is None else own * times.get(run, 0)
            won += weight * (1.0 if value < each.case else 0.5 if value == each.case else 0.0)
            pairs += weight
    return won / pairs if pairs else None


def interval(
    comparisons: Sequence[Comparison], runs: Sequence[int], seed: int = 0
) -> tuple[float, float]:
    """95% interval of the AUC by a bootstrap over runs: steps of one run are no independent runs.

    Args:
        comparisons: what the AUC is of.
        runs: all runs that stand in them.
        seed: of the draws.

    Returns:
        Its ends; (0, 1) where there is nothing to draw from.
    """
    draw = random.Random(seed)
    drawn = (Counter(draw.choices(runs, k=len(runs))) for _ in range(DRAWS if runs else 0))
    found = sorted(
        value for value in (auc(comparisons, times) for times in drawn) if value is not None
    )
    if not found:
        return 0.0, 1.0
    last = len(found) - 1
    return found[round(0.025 * last)], found[round(0.975 * last)]
