"""What to warn of, and what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from lightning_fp.counting import counted
from lightning_fp.kernels.padding import WORTH_SAYING
from lightning_fp.layers import Backend, LinearFormat, linear_format
from lightning_fp.layers.backends import could_run
from lightning_fp.records import StatisticsRows

_SHOWN = 3
"""Warnings per interval that are spelled out; the table has the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """From where on a row is worth a warning; None turns one off."""

    clamped_mass: float | None
    underflow: float | None
    nonfinite: int | None


class Warnings:
    """Says what is wrong with which layer: the first time, and then ever more rarely.

    Args:
        limits: from where on to warn.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._seen: dict[tuple[str, ...], int] = {}

    def of(self, rows: StatisticsRows, backend: Backend = "auto") -> list[str]:
        """The warnings of one interval, the worst first; a repeated one at its 2nd, 4th, 8th time.

        Args:
            rows: the interval's rows.
            backend: the run's, which advice must suit.
        """
        due: list[tuple[float, str]] = []
        for kind, row, excess in self._over_limit(rows):
            if self._is_due(rows.layers[row], rows.operands[row], kind):
                due.append((excess, _sentence(rows, row, kind, backend)))
        due.sort(key=lambda entry: -entry[0])
        shown = [sentence for _, sentence in due[:_SHOWN]]
        if due[_SHOWN:]:
            more = counted(len(due) - _SHOWN, "more operand")
            are = "is" if len(due) - _SHOWN == 1 else "are"
            shown.append(f"{more} {are} over a limit; see `lightning-fp stats`")
        if rows.padding_fraction > WORTH_SAYING and self._is_due("", "", "padding_fraction"):
            shown.append(_zeros(rows))
        return shown

    def _is_due(self, *key: str) -> bool:
        """Whether this is the 1st, 2nd, 4th, 8th, ... time."""
        self._seen[key] = times = self._seen.get(key, 0) + 1
        return times & (times - 1) == 0

    def _over_limit(self, rows: StatisticsRows) -> Iterator[tuple[str, int, float]]:
        """The kind of warning, the row, and how many times over the limit it is."""
        limits = {
            "nonfinite": self.limits.nonfinite,
            "clamped_mass": self.limits.clamped_mass,
            "underflow_fraction": self.limits.underflow,
        }
        for kind, limit in limits.items():
            if limit is None:
                continue
            values = rows.values[kind]
            over = ((values >= limit) & rows.low_precision).nonzero().flatten().tolist()
            for row in over:
                # Non-finite values come first, whatever their number.
                yield kind, row, float("inf") if kind == "nonfinite" else float(values[row]) / limit


def _sentence(rows: StatisticsRows, row: int, kind: str, backend: Backend) -> str:
    layer, operand, format = rows.layers[row], rows.operands[row], rows.formats[row]
    value, steps = float(rows.values[kind][row]), int(rows.values["sampled_steps"][row])
    over = f"over {steps} sampled step{'s' if steps != 1 else ''}"
    what = {
        "nonfinite": f"{operand} has {int(value)} inf or NaN elements",
        "clamped_mass": f"{operand} clamped mass {value:.1%} {over}",
        "underflow_fraction": f"{operand} underflow {value:.1%} {over}",
    }[kind]
    do = remedy(kind, layer, operand, format, backend)
    return f"layer {layer}: {what} under {format.name}; {do}"


def _zeros(rows: StatisticsRows) -> str:
    share = rows.values["padding_fraction"]
    worst = int(share.nan_to_num().argmax())
    return (
        f"{rows.padding_fraction:.1%} of the FLOPs of the layers in FP8 multiply zeros, which fill"
        f" up blocks of tokens; of layer {rows.layers[worst]} {float(share[worst]):.1%}. Where the"
        " number of tokens is a multiple of 32 there are none"
    )


def remedy(
    kind: str, layer: str, operand: str, format: LinearFormat, backend: Backend = "auto"
) -> str:
    """What to do about a row that is over a limit.

    Args:
        kind: "clamped_mass", "underflow_fraction", "sqnr_db" or "nonfinite".
        layer: the layer's name.
        operand: which of its operands.
        format: the format it ran in.
        backend: the run's; what it could not run on FP8 hardware is not advised.
    """
    # Clamping is the fault of a scale that is too large: leave room, or take it from the tensor
    # itself, which cannot clamp. Underflow is a lack of range: e5m2 reaches 14 bits further than
    # e4m3, and with a scale for each row an outlier takes the range from its own row only.
    if kind == "nonfinite":
        how = f"{_set(layer, 'bf16')} shows whether precision is to blame"
        return f"look at the loss and the learning rate; {how}"
    if format.scaling == "none":
        return f"{_set(layer, 'bf16')}, or take a format with more exponent bits"
    if kind == "clamped_mass":
        return f"raise margin, or {_set(layer, 'fp8-dynamic')}"
    by_row = [linear_format("fp8-rowwise")] if format.granularity == "tensor" else []
    wider = in_number(format, operand, "e5m2", backend)
    able = [each for each in (wider, *by_row) if each is not None and could_run(each, backend)]
    names = [each.name for each in able] or ["bf16"]
    if len(names) == 1 and wider is not None:
        names.append("bf16")
    return ", or ".join(_set(layer, name) for name in names)


def in_number(
    format: LinearFormat, operand: str, number: str, backend: Backend
) -> LinearFormat | None:
    """A format with one operand in another number format, as FP8 hardware could run it.

    Args:
        format: what to change.
        operand: which operand.
        number: "e4m3" or "e5m2".
        backend: the run's.

    Returns:
        The format, with the weight's gradient in high precision where that product would be of two
        e5m2 operands; None if it is that format already, or could not run.
    """
    given = format.torchao is not None or format.recipe is not None  # objects say more than fields
    if given or getattr(format, operand, number) == number:
        return None
    changes: dict[str, str] = {operand: number}
    try:
        other = dataclasses.replace(format, **changes)  # pyright: ignore[reportArgumentType]
    except ValueError:  # granularities with number formats of their own
        return None
    high = dataclasses.replace(other, grad_weight="high")
    return next((each for each in (other, high) if could_run(each, backend)), None)


def _set(layer: str, format: str) -> str:
    return f"set layers={{{layer!r}: {format!r}}}"
