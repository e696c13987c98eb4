"""What is usual for a signal: its level and its noise, learned value by value."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

SPANS = (8, 32, 128)
"""Steps that the averages look back. The level is the lowest of them: on a falling loss the short
ones are close, on a flat one the long one is exact, and a rise moves it only slowly."""

NOISE_SPAN = 256
"""Steps that the noise looks back; twice that of level 128, for what is divided by must be steady."""

RECENT_SPAN = 32
"""The same of the noise of late, which takes over where noise grows."""

BLOCK = 16
"""Steps whose sum tells how far noise adds up, so that neighbours that are alike raise no alarm."""

BLOCKS_SPAN = 64
"""Blocks looked back: 1024 steps."""

FLOOR_SPAN = 1024
"""Steps over which the floor gives way to a higher level; downwards it follows at once."""

_CLIP = 2.5
"""Differences count for at most so many standard deviations: Huber's proposal 2 (Robust Statistics,
1981, 6.4), as robust as the MAD here and twice as exact over the same steps."""

_CLIPPED = 0.9776
"""Mean square of a standard normal variable clipped at `_CLIP`."""

_UP, _DOWN = 3.0, 8.0
"""A value moves the averages as if at most so many standard deviations off the level."""

_START = 16
"""Values taken as they are, before noise is known well enough to clip by it."""

_SETTLED = 64
"""Values after which the longest average says something about the floor."""

_MARGINS = tuple(math.sqrt(1 / (2 * span - 1)) for span in SPANS)
"""Standard error of each average in units of the noise: what keeps the lowest from being biased."""

_MOST_SPREAD = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """The usual level and noise of one signal. Empty to begin with."""

    seen: int = 0
    """Values since learning (again) began."""

    last: float = 0.0
    """The value before; differences know nothing of the trend."""

    averages: tuple[float, ...] = ()
    """One for each of `SPANS`."""

    floor: float = math.inf
    """The lowest level, slowly forgotten: what a drift is measured from."""

    known: int = 0
    """Differences that the variances are made of."""

    variance: float = 0.0
    """Of a single value, from differences of neighbours."""

    recent: float = 0.0
    """The same over the last steps only."""

    spread: float = 1.0
    """Variance of sums over `BLOCK` steps, over that of independent values; of upward ones."""

    block: float = 0.0
    """Sum so far."""

    blocked: int = 0
    """Values in it."""

    def noise(self, least: float) -> float:
        """Robust standard deviation of a single value.

        Args:
            least: never smaller than this, in the units of the signal.
        """
        return max(math.sqrt(max(self.variance, 0.72 * self.recent)), least)

    def level(self, noise: float) -> float:
        """What the next value would usually be at most."""
        error = noise * math.sqrt(self.sums)
        return min(
            average + margin * error
            for average, margin in zip(self.averages, _MARGINS, strict=True)
        )

    @property
    def sums(self) -> float:
        """How much more the variance of a sum is than that of independent noise; at least 1."""
        return min(max(self.spread, 1.0), _MOST_SPREAD)

    def forget_level(self) -> Baseline:
        """Learn the level again, keep the noise."""
        return replace(self, seen=0, averages=(), floor=math.inf, block=0.0, blocked=0)

    def learn(self, value: float, least: float) -> Baseline:
        """With one more value.

        Args:
            value: finite.
            least: smallest noise, see `noise`.
        """
        if not self.seen:
            return replace(self, seen=1, last=value, averages=(value,) * len(SPANS))
        seen = self.seen + 1
        noise = self.noise(least)
        known, variance, recent = self._noise_with(value - self.last, least)
        taken = value
        spread, block, blocked = self.spread, self.block, self.blocked
        if seen > _START:
            level = self.level(noise)
            taken = min(max(value, level - _DOWN * noise), level + _UP * noise)
            block += min(max((value - level) / noise, -_UP), _UP)
            blocked += 1
            if blocked == BLOCK:
                sums = 2 * max(block, 0.0) ** 2 / BLOCK
                sums = min(sums, 9 * self.sums)
                spread += (sums - spread) / BLOCKS_SPAN
                block, blocked = 0.0, 0
        averages = tuple(
            average + (taken - average) / min(span, 1 + seen / 2)
            for average, span in zip(self.averages, SPANS, strict=True)
        )
        slow = averages[-1]
        floor = self.floor
        if seen >= _SETTLED:
            floor = slow if slow < floor else floor + (slow - floor) / FLOOR_SPAN
        return Baseline(
            seen=seen,
            last=value,
            averages=averages,
            floor=floor,
            known=known,
            variance=variance,
            recent=recent,
            spread=spread,
            block=block,
            blocked=blocked,
        )

    def _noise_with(self, difference: float, least: float) -> tuple[int, float, float]:
        square = difference * difference / 2
        known = self.known + 1
        if known <= _START:  # nothing to clip by yet
            mean = self.variance + (square - self.variance) / known
            return known, mean, mean
        most = _CLIP * _CLIP
        variance = min(square, most * max(self.variance, least * least)) / _CLIPPED
        recent = min(square, most * max(self.recent, least * least)) / _CLIPPED
        return (
            known,
            self.variance + (variance - self.variance) / min(NOISE_SPAN, 1 + known / 4),
            self.recent + (recent - self.recent) / RECENT_SPAN,
        )
