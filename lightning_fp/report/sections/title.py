"""What a run was: its model and format, when and where it ran."""

from __future__ import annotations

import time

from lightning_fp.counting import counted
from lightning_fp.report.draw.parts import duration
from lightning_fp.report.read.cost import RunCost
from lightning_fp.report.read.format_history import ever_low, is_low
from lightning_fp.report.read.run_records import RunRecords
from lightning_fp.report.sections.answer import name_of_low


def title(records: RunRecords) -> str:
    """Model and format; where these are not recorded, the run's name.

    Args:
        records: the run's.
    """
    if not records.starts:
        return records.name
    model = records.starts[-1].model or records.name
    return f"{model} in {_precision(records)}"


def particulars(records: RunRecords, cost: RunCost) -> list[str]:
    """When, for how long, on what, how large, and where the records are.

    Args:
        records: the run's.
        cost: what it cost.
    """
    found: list[str] = []
    if records.starts:
        info = records.starts[-1]
        found.append(time.strftime("%Y-%m-%d %H:%M", time.localtime(records.starts[0].time)))
        if cost.seconds is not None:
            found.append(duration(cost.seconds))
        if info.device:
            found.append(
                f"{info.world_size} x {info.device}" if info.world_size > 1 else info.device
            )
        if info.parameters:
            found.append(f"{_short(info.parameters)} parameters")
        if len(records.starts) > 1:
            found.append(f"resumed {counted(len(records.starts) - 1, 'time')}")
    elif cost.seconds is not None:
        found.append(duration(cost.seconds))
    return [*found, str(records.path)]


def _precision(records: RunRecords) -> str:
    high = sorted({layer.format for layer in records.layers})
    if high and not any(is_low(format) for format in high) and not ever_low(records):
        return " and ".join(high)
    for options in records.settings.values():
        if "scaling" in options:
            scaling = str(options["scaling"])
            if not is_low(scaling):
                return scaling
            name = name_of_low(records)
            return scaling if name == scaling else f"{name} ({scaling})"
    low = sorted({layer.format for layer in records.layers if is_low(layer.format)})
    if low:
        return ", ".join(low)
    told = [o["precision"] for o in records.settings.values() if o.get("precision")]
    return str(told[0]) if told else high[0] if high else "high precision"


def _short(number: int) -> str:
    """A large number as people say it.

    >>> _short(950), _short(63_232), _short(8_030_000_000)
    ('950', '63K', '8.0B')
    """
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            value = number / size
            return f"{value:.1f}{unit}" if value < 10 else f"{value:.0f}{unit}"
    return str(number)
