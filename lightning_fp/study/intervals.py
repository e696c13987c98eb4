"""Intervals of rates that were counted in few runs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence

DRAWS = 4000
"""Of a posterior: the ends of a 95% interval are then known to about one percent of its width."""

_Z = 1.959964
"""Of a two-sided 95% interval."""


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95% interval of a rate (Wilson 1927, Journal of the American Statistical Association 22).

    >>> [round(end, 2) for end in wilson(0, 5)]
    [0.0, 0.43]

    Args:
        hits: how often it happened.
        count: in so many runs; without any, nothing is known.
    """
    if not count:
        return 0.0, 1.0
    rate, z2 = hits / count, _Z * _Z
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def posterior(
    counts: Sequence[tuple[int, int]], value: Callable[[Sequence[float]], float], seed: int = 0
) -> tuple[float, float]:
    """95% interval of something that follows from several rates.

    Each rate is drawn from its posterior under Jeffreys' prior, so that none out of five does not
    pass for never. What follows from the counted rates is always inside (Brown, Cai and DasGupta
    2001, Statistical Science 16, 4.1.1).

    Args:
        counts: hits and runs of each rate.
        value: what follows from the rates.
        seed: of the draws.
    """
    values = sorted(map(value, posterior_draws(counts, DRAWS, seed)))
    counted = value([hits / runs for hits, runs in counts])
    return min(counted, quantile(values, 0.025)), max(counted, quantile(values, 0.975))


def posterior_draws(
    counts: Sequence[tuple[int, int]], draws: int, seed: int = 0
) -> Iterator[list[float]]:
    """Rates that would explain what was counted, see `posterior`.

    Args:
        counts: hits and runs of each rate.
        draws: how many.
        seed: of the draws.
    """
    draw = random.Random(seed)
    for _ in range(draws):
        yield [draw.betavariate(hits + 0.5, runs - hits + 0.5) for hits, runs in counts]


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of values in order, linear between neighbours."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    if ordered[low] == ordered[high]:  # inf less inf is no number
        return ordered[low]
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
