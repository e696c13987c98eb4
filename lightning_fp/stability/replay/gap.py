"""The forward gap: the same batches and weights, in the run's formats and in high precision.

Both losses are of one set of weights, so there is no chaos between them, and no control is needed.
A fault that a trajectory does not show yet stands out: where that one acquitted, the gap was 3%.
The sign tells only for a while. Weights adapt to a format that harms them, and high precision then
has the higher loss (5% after 24 steps): such a gap alarms, and does not convict.

Measured on Llama-like, ViT and Mixer nets, 156 looks at 8 batches of healthy runs: the mean was at
most 0.36% of the loss (median 0.04%), that of a single batch at most 0.97%.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from lightning_fp.counting import counted

BATCHES = 8
"""Batches of a look, to begin with."""

MOST_BATCHES = 32
"""Batches at which a look ends that is still uncertain."""

ALARM = 0.01
"""Share of the loss beyond which a mean, of either sign, is not healthy."""

HARMLESS = 0.005
"""Share of the loss that a healthy format may cost."""

ONE_BATCH = 0.03
"""Share of the loss at which a single batch convicts."""

ONE_OF_A_SMALL_LOSS = 0.5
"""The same of a small loss: single batches of healthy runs came to 4% of a regression's around
zero, and to 8% in BatchNorm nets."""

_NONE = 5e-4
"""Share of the loss below which a sentence calls two losses the same."""

SCATTER = 3.0
"""Times as far as any batch is in the other direction, that a single one must be up to convict.
Where a step samples from what the model says, as a policy's does, a rounding now and then changes
the sample, and batches are up and down by 10%."""

_LEAST_T = {4: 10.21, 5: 7.17, 6: 5.89, 7: 5.21, 8: 4.79, 16: 4.07, 32: 3.63}
"""By number of batches, Student's t that a harmless gap exceeds once in 1,000 looks, and once in
2,000 where it is a second or third question. Of fewer than 4 batches only a single one tells."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """What a format costs, as a share of the loss; above 0 where high precision has the lower."""

    count: int
    """Batches that say something."""

    mean: float
    """NaN without any; inf where only the run's formats give inf or NaN."""

    error: float
    """Standard error of the mean; inf for fewer than 2 batches."""

    worst: float
    """The largest of a single batch."""

    lowest: float = 0.0
    """The smallest; below 0 where high precision has the higher loss in some batch."""

    one_batch: float = ONE_BATCH
    """The share at which a single batch convicts."""

    @property
    def alarming(self) -> bool:
        """Whether it is larger than in healthy runs, in either direction."""
        return abs(self.mean) > ALARM

    @property
    def calm(self) -> bool:
        """Whether it is as in healthy runs. Neither this nor `alarming` if nothing is known."""
        return abs(self.mean) <= ALARM

    @property
    def convicts(self) -> bool:
        """Whether precision does harm, on these weights, beyond doubt."""
        if self.worst > max(self.one_batch, -SCATTER * self.lowest):
            return True
        # Between two counts the smaller one's bound, which is the stricter.
        most = max((count for count in _LEAST_T if count <= self.count), default=None)
        if most is None or not self.mean > ALARM:
            return False
        return self.mean - HARMLESS > _LEAST_T[most] * self.error

    @property
    def wants(self) -> int | None:
        """How many batches to look at for certainty; None if these are enough."""
        uncertain = math.isnan(self.mean) or self.mean + 2 * self.error > ALARM
        if self.convicts or not uncertain or self.count >= MOST_BATCHES:
            return None
        return min(max(2 * self.count, BATCHES), MOST_BATCHES)

    @property
    def numbers(self) -> dict[str, float]:
        """For an event."""
        return {
            "gap": self.mean,
            "gap_error": self.error,
            "gap_worst": self.worst,
            "batches": float(self.count),
        }

    @property
    def sentence(self) -> str:
        """E.g. "on 8 batches the loss is 3.1% lower in high precision"."""
        batches = counted(self.count, "batch", "batches")
        if math.isnan(self.mean):
            return "no batch has a finite loss in high precision"
        if math.isinf(self.mean):
            return f"on {batches} the loss is finite in high precision only"
        if abs(self.mean) < _NONE:
            return f"on {batches} the loss is that of high precision"
        side = "lower" if self.mean >= 0 else "higher"
        return f"on {batches} the loss is {abs(self.mean):.1%} {side} in high precision"


def measure_gap(
    losses: Sequence[float],
    high_losses: Sequence[float],
    *,
    least: float = 0.0,
) -> Gap:
    """Compare the losses of the same batches, on the same weights.

    Args:
        losses: in the run's formats, by batch, mean over ranks.
        high_losses: in high precision. A batch that is not finite here says nothing.
        least: the loss from which on shares of it tell, see `Anomaly.least`; 0 if that is not
            known, and no finite loss of a single batch convicts.

    Returns:
        Shares of the mean loss, or of `least` if that is more.
    """
    pairs = [
        (low, high) for low, high in zip(losses, high_losses, strict=True) if math.isfinite(high)
    ]
    if not pairs:
        return Gap(count=0, mean=math.nan, error=math.inf, worst=math.nan)
    loss = abs(fmean(high for _, high in pairs))
    unit = max(loss, least) or 1.0
    one_batch = ONE_BATCH if loss >= least else ONE_OF_A_SMALL_LOSS
    gaps = [(low - high) / unit if math.isfinite(low) else math.inf for low, high in pairs]
    finite = all(map(math.isfinite, gaps))
    known = finite and len(gaps) > 1
    return Gap(
        count=len(gaps),
        mean=fmean(gaps) if finite else math.inf,
        error=stdev(gaps) / math.sqrt(len(gaps)) if known else math.inf,
        worst=max(gaps),
        lowest=min(gaps),
        one_batch=one_batch if least > 0 else math.nextafter(math.inf, 0.0),
    )
