"""A curve in one line of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40


def sparkline(
    values: Sequence[float | None], width: int = _WIDTH, *, of: Callable[..., float | None] = max
) -> str:
    """A curve in one line of text, from its least to its largest value.

    >>> sparkline([0, 1, 2, None, 3])
    '▁▃▆ █'

    Args:
        values: the curve; None and values that are not finite become gaps.
        width: characters at most; of a longer curve each character stands for a stretch.
        of: what is shown of a stretch: `max` or `min`, whichever is worse.
    """
    stretch = max(1, math.ceil(len(values) / width))
    known = [v if v is not None and math.isfinite(v) else None for v in values]
    parts = [known[i : i + stretch] for i in range(0, len(known), stretch)]
    points = [of((v for v in part if v is not None), default=None) for part in parts]
    finite = [v for v in points if v is not None]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if v is None else _BARS[round((v - low) * scale)] for v in points)
