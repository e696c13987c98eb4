"""What the statistics advise: which operand to cast otherwise, and what that would have lost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from lightning_fp.counting import counted
from lightning_fp.layers import Backend, linear_format
from lightning_fp.layers.backends import could_run
from lightning_fp.report.draw.heatmaps import LIMITS
from lightning_fp.report.draw.parts import Table
from lightning_fp.report.read.digest import WHAT_IF, Digest, Ranking, Totals
from lightning_fp.report.sections.setting import LATE
from lightning_fp.statistic_names import share

_GAIN = 0.5
"""Another scaling is advised where it would have flushed at most this share of what was."""

_SAFE_DELAYED = 1e-4
"""Clamped mass up to which delayed scaling would have been harmless: a hundredth of the limit."""

_LITTLE = 1e-4
"""Shares below this are not told apart."""

_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One operand, and what to do about it."""

    of: Totals
    badness: float
    """How many times over its limit."""
    what: str
    do: str


def limits_of(settings: Mapping[str, Mapping[str, Any]]) -> dict[Ranking, float]:
    """The limits that a run was watched by, or the usual ones.

    Args:
        settings: options by class, as `RunRecords.settings`.
    """
    warned: Mapping[str, Any] = settings.get("ClampMonitor", {}).get("limits") or {}
    layer: Mapping[str, Any] = settings.get("PrecisionFallback", {}).get("limit") or {}
    own: dict[Ranking, Any] = {
        "clamped_mass": warned.get("clamped_mass"),
        "underflow_fraction": warned.get("underflow"),
        "sqnr_db": layer.get("sqnr_db"),
    }
    return {name: LIMITS[name] if value is None else float(value) for name, value in own.items()}


def backend_of(settings: Mapping[str, Mapping[str, Any]]) -> Backend:
    """The backend that a run had.

    Args:
        settings: options by class, as `RunRecords.settings`.
    """
    told = [options["backend"] for options in settings.values() if "backend" in options]
    return next((backend for backend in get_args(Backend) if backend in told), "auto")


def advise(
    digest: Digest,
    limits: Mapping[Ranking, float],
    now: Mapping[str, str] | None = None,
    backend: Backend = "auto",
) -> list[Advice]:
    """What is over a limit throughout, the worst first; one bad interval is no reason to change.

    Args:
        digest: the run's statistics.
        limits: by ranking.
        now: each layer's format at the end of the run; a layer that has left the format in which
            it was over a limit needs no change, and comes last.
        backend: the run's; what it could not run on FP8 hardware is not advised.
    """
    found: list[Advice] = []
    for of in digest.totals:
        last = (now or {}).get(of.layer, of.format)
        for badness, what, do in _over_limit(of, limits, backend):
            if last != of.format:
                badness, do = 0.0, f"nothing: the run has moved it to {last}"
            found.append(Advice(of=of, badness=badness, what=what, do=do))
    return sorted(found, key=lambda advice: (-advice.badness, advice.of.layer, advice.of.operand))


def _over_limit(
    of: Totals, limits: Mapping[Ranking, float], backend: Backend
) -> Iterator[tuple[float, str, str]]:
    """How many times over its limit an operand is, in what, and what to do about it."""
    # Imports Lightning, which nothing else in a report needs.
    from lightning_fp.telemetry.casts.remedies import remedy

    try:
        operand = of.layer, of.operand, linear_format(of.format), backend
    except ValueError:  # a format of a later version
        return
    clamped, flushed = of.mean["clamped_mass"] or 0.0, of.mean["underflow_fraction"] or 0.0
    if of.nonfinite:
        yield math.inf, f"{of.nonfinite:,} inf or NaN", remedy("nonfinite", *operand)
    if clamped >= (limit := limits["clamped_mass"]):
        do = remedy("clamped_mass", *operand) + _dynamic_loses(of)
        yield clamped / limit, f"clamped mass {share(clamped)} on average", do
    if flushed >= (limit := limits["underflow_fraction"]):
        do = _evidence(of, flushed, backend) or remedy("underflow_fraction", *operand)
        yield flushed / limit, f"underflow {share(flushed)} on average", do


def advice_table(advice: Sequence[Advice]) -> Table:
    """What to change, and why."""
    rows = [[a.of.layer, a.of.operand, a.of.format, a.what, a.do] for a in advice[:_SHOWN]]
    more = len(advice) - len(rows)
    return Table(
        title="",
        columns=("layer", "operand", "format", "what is wrong", "what to do"),
        rows=rows,
        note=f"Over a limit: {counted(more, 'more operand')}." if more > 0 else "",
    )


def what_if_table(digest: Digest) -> Table | None:
    """What other scalings would have lost on the same tensors; None if that was not recorded."""
    known = [of for of in digest.totals if any(of.mean[name] is not None for name in WHAT_IF)]
    if not known:
        return None

    def loss(of: Totals) -> float:
        return (of.mean["clamped_mass"] or 0.0) + (of.mean["underflow_fraction"] or 0.0)

    shown = sorted(known, key=lambda of: (-loss(of), of.layer, of.operand))[:_SHOWN]
    shown = [of for of in shown if loss(of) >= _LITTLE] or shown[:1]
    formats = {of.format for of in shown}
    rows = [
        [
            of.layer,
            of.operand,
            *((of.format,) if formats - {of.format} else ()),
            *(_little(of.mean[name]) for name in ("clamped_mass", "underflow_fraction", *WHAT_IF)),
        ]
        for of in shown
    ]
    alike = next(iter(formats)) if len(formats) == 1 else ""
    columns = (
        "layer",
        "operand",
        *(() if alike else ("format",)),
        "as run: clamped mass",
        "as run: underflow",
        "delayed: clamped mass",
        "delayed: underflow",
        "dynamic: underflow",
        "rowwise: underflow",
        "other 8-bit: underflow",
    )
    return Table(
        title="What other scalings would have lost on the same tensors",
        columns=columns,
        rows=rows,
        numbers=frozenset(range(2 if alike else 3, len(columns))),
        note=f"Means over the run, of the operands that lost most{alike and f', all in {alike}'}."
        " Dynamic scaling cannot clamp.",
        long=True,
    )


def delayed_would_do(digest: Digest) -> str:
    """A sentence about the dynamic layers that delayed scaling would not have clamped, or ""."""
    worst: dict[str, float] = {}
    for of in digest.totals:
        clamped = of.mean["what_if_delayed_clamped_mass"]
        if of.format.startswith("fp8-dynamic") and clamped is not None:
            worst[of.layer] = max(worst.get(of.layer, 0.0), clamped)
    safe = [layer for layer, clamped in worst.items() if clamped <= _SAFE_DELAYED]
    if not safe:
        return ""
    return (
        f"{len(safe)} of {len(worst)} layers in fp8-dynamic would have clamped next to nothing"
        " under delayed scaling, which needs no pass for the amax: fp8-delayed is an option there."
        f" {LATE}"
    )


def _little(value: float | None) -> str:
    """A share, or that it is next to nothing."""
    return "<0.01%" if value is not None and 0 < value < _LITTLE else share(value)


def _dynamic_loses(of: Totals) -> str:
    flushed = of.mean["what_if_dynamic_underflow_fraction"]
    return "" if flushed is None else f" (it would have flushed {share(flushed)} to zero)"


def _evidence(of: Totals, flushed: float, backend: Backend) -> str:
    """The scaling that would have lost least, if it was measured and is much better."""
    rowwise = linear_format("fp8-rowwise")
    tried = {
        rowwise.name if could_run(rowwise, backend) else "": "what_if_rowwise_underflow_fraction",
        _other(of, backend): "what_if_other_underflow_fraction",
    }
    measured = {name: of.mean[column] for name, column in tried.items() if name}
    measured = {name: value for name, value in measured.items() if value is not None}
    if not measured:
        return ""
    best = min(measured, key=lambda name: measured[name])
    if measured[best] > flushed * _GAIN:
        return ""
    set_it = f"set layers={{{of.layer!r}: {best!r}}}"
    return f"{set_it}: it would have flushed {share(measured[best])}"


def _other(of: Totals, backend: Backend) -> str:
    """fp8-dynamic with the other 8-bit format for this operand, if the backend could run that."""
    # Imports Lightning, which nothing else in a report needs.
    from lightning_fp.telemetry.casts.remedies import in_number

    format = linear_format(of.format)
    number = {"e4m3": "e5m2", "e5m2": "e4m3"}.get(getattr(format, of.operand, ""), "")
    if not number or not format.is_fp8:
        return ""
    other = in_number(linear_format("fp8-dynamic"), of.operand, number, backend)
    return "" if other is None else other.name
