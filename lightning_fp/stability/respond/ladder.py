"""The safety ladder: from a format to the next safer one.

`fp8-delayed` -> `fp8-dynamic` -> `fp8-rowwise` -> `fp8-rowwise-gw-hp` -> high precision. Each rung
takes away one cause of error: old scales, one scale for many rows, the cast of grad_weight's
operands, all casts.

`fp8-block` and `mxfp8` stand beside it, with a ladder of their own: grad_weight in high precision,
then all. Their scales are finer than a row's already, so `fp8-rowwise` is not above them. Nor does
anything climb *to* them, though they would take away one more cause, outliers within a row: on FP8
hardware without Transformer Engine, or before Blackwell, they do not run, and a run should climb
the same rungs here and there. Who has the hardware begins with them.
"""

from __future__ import annotations

import dataclasses

from lightning_fp.format_names import LADDER
from lightning_fp.layers import LinearFormat, PrecisionMap, SwitchableLayer
from lightning_fp.layers.format import NAMED_FORMATS


def rungs_above(
    format: LinearFormat, high: LinearFormat, table: PrecisionMap, layer: SwitchableLayer
) -> list[LinearFormat]:
    """The safer formats that a layer can run here, the nearest first; high precision is the last.

    Args:
        format: the layer's format; one that is not on the ladder has only high precision above.
        high: the high precision of this run.
        table: knows what runs here.
        layer: the layer, whose shape decides too.

    Returns:
        At least `high`; empty for a layer in high precision.
    """
    if format.is_high_precision:
        return []
    if format.is_fp8 and format.row.rung is None:  # beside the ladder
        above = [dataclasses.replace(format, grad_weight="high")]
    else:
        above = [_like(format, NAMED_FORMATS[name]) for name in LADDER[_rung(format) + 1 :]]
    distinct = dict.fromkeys(rung for rung in above if rung != format)
    return [rung for rung in distinct if table.known.can_run(layer, rung)] + [high]


def _rung(format: LinearFormat) -> int:
    """Where a format stands, also one that the user has changed in details."""
    if not format.is_fp8 or format.torchao is not None or format.recipe is not None:
        return len(LADDER) - 1
    rungs = [NAMED_FORMATS[name] for name in LADDER]
    return max(
        index
        for index, rung in enumerate(rungs)
        if (rung.scaling, rung.granularity) == (format.scaling, format.granularity)
        and rung.grad_weight in ("fp8", format.grad_weight)
    )


def _like(format: LinearFormat, rung: LinearFormat) -> LinearFormat:
    """While the granularity stays, so do the operands' formats: they were chosen on evidence.

    What is in high precision already stays there: no rung takes back another one's gain.
    """
    high = "high" in (format.grad_weight, rung.grad_weight)
    base = format if rung.granularity == format.granularity else rung
    return dataclasses.replace(
        base,
        scaling=rung.scaling,
        grad_weight="high" if high else "fp8",
        quantise_like=format.quantise_like,
    )
