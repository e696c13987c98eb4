"""What is usual for a signal: its level and its noise, learned value by value.

Median and MAD over a window, the usual choice, lag half a window behind a falling loss and cost a
sort per step. Here the level is the lowest of three running averages, less what a falling loss
falls on: it goes down at once and up slowly, so that an anomaly does not raise its own reference.
The noise comes from differences between neighbours, in which trends cancel. Where neighbours are
alike, sums scatter more than such differences tell: that is measured apart (`spread`), and makes
thresholds of sums larger. It is arithmetic on a few Python floats, and waits for no device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

SPANS = (8, 32, 128)
"""Steps that the averages look back: on a falling loss the short ones are close, on a flat one the
long one is exact."""

RISE_SPAN = 128
"""Steps in which the level gives way to higher averages. It follows lower ones at once, so that
neither a steep descent nor the anomaly itself hides an anomaly."""

FLOOR_SPAN = 1024
"""The same of the floor that drifts are measured from: what climbs more slowly than this is not
taken for an anomaly."""

NOISE_SPAN = 256
"""Steps that the noise looks back. Everything is divided by it, so it must be steady."""

RECENT_SPAN = 32
"""The same of the noise of late, which takes over where noise grows."""

BLOCK = 16
"""Steps whose sum tells how noise adds up, see `SignalLevel.spread`."""

BLOCKS_SPAN = 64
"""Blocks looked back: 1024 steps."""

START = 16
"""Values taken as they are, until noise is known well enough to tell an outlier."""

SETTLED = 64
"""Values after which the longest average says something about the floor."""

_CAUTION = 0.75
"""Share of the descent, as old and as recent averages both see it, that is expected to go on."""

_MARGINS = tuple(
    errors * math.sqrt(1 / (2 * span - 1))
    for errors, span in zip((2.5, 1.5, 0.5), SPANS, strict=True)
)
"""Added to each average, so many of its standard errors in units of the noise. The lowest of three
noisy averages, remembered, is below the mean: with these, scores of healthy noise have a mean of
0.0 to -0.1 (-0.2 where neighbours are alike)."""

_CLIP = 2.5
"""Differences count for at most so many standard deviations (Huber's proposal 2, Robust Statistics,
1981, 6.4): about as robust as the MAD, more exact, and without a window to sort."""

_CLIPPED = 0.9776
"""Mean square of a standard normal variable clipped at `_CLIP`."""

_RECENT_SHARE = 0.72
"""Of the variance of late, which is itself noisy and would else be the larger one too often."""

_UP, _DOWN = 3.0, 8.0
"""A value moves the averages as if at most so many standard deviations off the level. Further down
than up, because healthy losses fall fast and do not rise fast."""

_MOST_PATIENCE = 8.0
"""Beyond it nothing but blow-ups would be found."""

_SPREAD_STEP = 9.0
"""One block counts for at most so many times the spread so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SignalLevel:
    """The usual level and noise of one signal: a few numbers, whatever the length of the run."""

    seen: int = 0
    """Values since learning (again) began."""

    last: float = 0.0
    """The value before. Noise is measured between neighbours, where trends do not count."""

    averages: tuple[float, ...] = ()
    """One for each of `SPANS`."""

    level: float = 0.0
    """What a value usually is."""

    descent: float = 0.0
    """What the level falls by per step, at least 0 and rather too little than too much."""

    floor: float = math.inf
    """The lowest level, slowly forgotten."""

    known: int = 0
    """Differences that the variances are made of; they outlive `forget_level`."""

    variance: float = 0.0
    """Of a single value."""

    recent: float = 0.0
    """The same of late."""

    spread: float = 1.0
    """Variance of sums of `BLOCK` scores, over `BLOCK`: 1 for independent noise, more where
    neighbours are alike or the tails are heavy. From one sum to the next, where trends do not
    count. False alarms come from sums, so thresholds grow with it."""

    block: float = 0.0
    """Sum of scores so far."""

    blocked: int = 0
    """Scores in it."""

    block_before: float | None = None
    """The sum before that."""

    def noise(self, least: float) -> float:
        """Robust standard deviation of a single value.

        Args:
            least: it is never smaller, in the units of the signal.
        """
        return max(math.sqrt(max(self.variance, _RECENT_SHARE * self.recent)), least)

    @property
    def patience(self) -> float:
        """What thresholds of sums of scores are multiplied with; 1 to 8."""
        return min(max(self.spread, 1.0), _MOST_PATIENCE)

    def drift(self, noise: float) -> float:
        """How far the level of late is above the floor, in standard deviations; 0 if unknown.

        Args:
            noise: of a single value.
        """
        if self.floor == math.inf:
            return 0.0
        return (self.averages[1] - self.floor) / noise

    def forget_level(self) -> SignalLevel:
        """Learn the level again, keep the noise."""
        return SignalLevel(
            known=self.known, variance=self.variance, recent=self.recent, spread=self.spread
        )

    def learn(self, value: float, least: float) -> SignalLevel:
        """With one more value.

        Args:
            value: finite.
            least: smallest noise, see `noise`.
        """
        if not self.seen:
            return replace(self, seen=1, last=value, averages=(value,) * len(SPANS), level=value)
        seen = self.seen + 1
        noise = self.noise(least)
        known, variance, recent = self._variances(value - self.last, least)
        spread, block, blocked = self.spread, self.block, self.blocked
        before = self.block_before
        # Averages take outliers as less than they are, or one of them would move the level for as
        # long as the longest looks back. Not at the begin, when nobody knows what an outlier is.
        taken = value
        if seen > START:
            taken = min(max(value, self.level - _DOWN * noise), self.level + _UP * noise)
            spread, block, blocked, before = self._spread((taken - self.level) / noise)
        near, mid, far = SPANS
        half = 1 + seen / 2  # a curve flattens with its age
        if half < far:
            near, mid, far = min(near, half), min(mid, half), half
        short, middle, long = self.averages
        short += (taken - short) / near
        middle += (taken - middle) / mid
        long += (taken - long) / far
        descent = 0.0
        if short < middle < long and mid < far:
            # On a straight line an average lags by its span: two of them tell the slope. Of the
            # slope of late and the one before the smaller counts, since curves flatten.
            slope = min((middle - short) / (mid - near), (long - middle) / (far - mid))
            descent = _CAUTION * slope
        error = noise * math.sqrt(self.patience)  # of averages, where neighbours are alike
        lowest = min(
            short + _MARGINS[0] * error,
            middle + _MARGINS[1] * error - descent * mid,
            long + _MARGINS[2] * error,
        )
        floor = self.floor
        if seen >= SETTLED:
            floor = _follow(floor, long, 1 / FLOOR_SPAN)
        return SignalLevel(
            seen=seen,
            last=value,
            averages=(short, middle, long),
            level=_follow(self.level, lowest, 1 / min(RISE_SPAN, half)),
            descent=descent,
            floor=floor,
            known=known,
            variance=variance,
            recent=recent,
            spread=spread,
            block=block,
            blocked=blocked,
            block_before=before,
        )

    def _variances(self, difference: float, least: float) -> tuple[int, float, float]:
        square = difference * difference / 2  # two values scatter in it
        known = self.known + 1
        variance, recent = self.variance, self.recent
        if known <= START:
            variance += (square - variance) / known
            return known, variance, variance
        least *= least
        slow = min(square, _CLIP * _CLIP * max(variance, least)) / _CLIPPED
        fast = min(square, _CLIP * _CLIP * max(recent, least)) / _CLIPPED
        variance += (slow - variance) / min(NOISE_SPAN, 1 + known / 4)
        recent += (fast - recent) / RECENT_SPAN
        return known, variance, recent

    def _spread(self, score: float) -> tuple[float, float, int, float | None]:
        block = self.block + max(score, -_UP)
        blocked = self.blocked + 1
        if blocked < BLOCK:
            return self.spread, block, blocked, self.block_before
        spread = self.spread
        if self.block_before is not None:
            # Between two sums, for the same reason as between two values: trends cancel.
            squares = (block - self.block_before) ** 2 / (2 * BLOCK)
            squares = min(squares, _SPREAD_STEP * self.patience)
            gain = max(1 / BLOCKS_SPAN, 1 / (BLOCKS_SPAN / 4 + self.known / BLOCK))
            spread += (squares - spread) * gain
        return spread, 0.0, 0, block


def _follow(level: float, value: float, gain: float) -> float:
    """Down at once, up slowly."""
    return value if value < level else level + (value - level) * gain
