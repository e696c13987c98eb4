"""The setting to take next time: the plugin as it was, with the formats that layers ended in."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_fp.records import StageChange
from lightning_fp.report.read.format_history import format_changes, is_low, last_formats
from lightning_fp.report.read.run_records import RunRecords

LATE = (
    "Delayed scaling is known to fail late, at about 200B tokens (arXiv 2409.12517), so no short"
    " run proves it safe for a long one: take dynamic scaling there."
)
"""What belongs beside every advice to take it; see `DELAYED_TOKEN_LIMIT`."""

_SAFER = ("demote", "limit", "unproven")
_NAMED = 8
"""Rules of the setting at most."""


def ever_made_safer(records: RunRecords) -> set[str]:
    """Layers that were given a safer format than they were configured in, at any time."""
    return made_safer_by_watch(records) | pulled_back(records).keys()


def made_safer_by_watch(records: RunRecords) -> set[str]:
    """Those of them that the watch has moved."""
    changes = format_changes(records.events)
    return {layer for event in changes if event.kind in _SAFER for layer in event.layers}


def ended_safer(records: RunRecords) -> dict[str, str]:
    """Layers that ended in a safer format than they were configured in, and that format."""
    safer = pulled_back(records)
    for event in format_changes(records.events):
        for layer, (_, after) in event.formats.items():
            if event.kind in _SAFER:
                safer[layer] = after
            elif event.kind == "promote":
                safer.pop(layer, None)
    order = [layer.name for layer in records.layers]
    return dict(sorted(safer.items(), key=lambda item: _place(order, item[0])))


def setting_for(records: RunRecords, safer: Mapping[str, str]) -> str:
    """The plugin to write next time; empty where one line cannot say it.

    Args:
        records: the run's.
        safer: formats of single layers that it should have.
    """
    name, options = next(
        ((name, o) for name, o in records.settings.items() if "scaling" in o), ("", {})
    )
    own_rules = _rules(safer, [layer.name for layer in records.layers])
    if not name or len(own_rules) > _NAMED:
        return ""
    scaling = str(options["scaling"]).removeprefix("fp8-")
    own = options.get("layers") or {}
    layers = {**own_rules, **(dict(own) if isinstance(own, Mapping) else {})}
    rules = ", ".join(f'"{layer}": "{format}"' for layer, format in layers.items())
    return f'{name}("{scaling}"{f", layers={{{rules}}}" if rules else ""})'


def pulled_back(records: RunRecords) -> dict[str, str]:
    """Layers that a rollout took out of low precision again, and has not put back since."""
    seen: set[str] = set()
    back: set[int] = set()
    for event in records.events:
        if isinstance(event, StageChange):
            if event.stage in seen:
                back.add(event.step)
            seen |= {event.previous, event.stage}
    pulled: dict[str, str] = {}
    for event in format_changes(records.events):
        if event.kind != "format":
            continue
        for layer, (before, after) in event.formats.items():
            if is_low(after):
                pulled.pop(layer, None)
            elif is_low(before) and event.step in back:
                pulled[layer] = after
    ends = last_formats(records)
    return {layer: format for layer, format in pulled.items() if ends.get(layer) == format}


def _rules(formats: Mapping[str, str], names: list[str]) -> dict[str, str]:
    """Rules that give these layers these formats, and no others: whole blocks by one pattern.

    >>> _rules({"h.0.a": "bf16", "h.0.b": "bf16", "h.1.a": "fp32"}, ["h.0.a", "h.0.b", "h.1.a"])
    {'h.0.*': 'bf16', 'h.1.a': 'fp32'}
    """
    found: dict[str, str] = {}
    for layer, format in formats.items():
        block = _block(layer)
        inside = [name for name in names if block and name.startswith(f"{block}.")]
        whole = len(inside) > 1 and all(formats.get(name) == format for name in inside)
        found[f"{block}.*" if whole else layer] = format
    return found


def _block(layer: str) -> str:
    """The block that a layer is in: its name up to the first number; "" where there is none."""
    parts = layer.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return "" if at is None else ".".join(parts[: at + 1])


def _place(order: list[str], name: str) -> int:
    return order.index(name) if name in order else len(order)
