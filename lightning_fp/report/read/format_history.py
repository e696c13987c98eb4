"""The format of every layer over time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lightning_fp.layers import linear_format
from lightning_fp.layers.layer_names import fold_names
from lightning_fp.records import Event, FormatChange
from lightning_fp.report.read.run_records import RunRecords

HIGH = "high precision"
"""What a layer is in where the statistics have no row of it."""

FormatHistory: TypeAlias = tuple[tuple[int, str], ...]
"""From which step on which format, ascending."""

_MANY = 40
"""Rows up to which layers are grouped only with their neighbours."""


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers that had the same formats at the same time."""

    layers: tuple[str, ...]
    history: FormatHistory

    @property
    def label(self) -> str:
        """The layers' names, repeated blocks folded; of several the first, and how many more."""
        first, *others = fold_names(self.layers)
        return f"{first} and {len(others)} more" if others else first


def format_changes(events: Iterable[Event]) -> list[FormatChange]:
    """Those that changed formats: in a dry run they only say what they would have done."""
    changes = [event for event in events if isinstance(event, FormatChange)]
    return [change for change in changes if not change.action.startswith("dry run")]


def format_histories(records: RunRecords) -> dict[str, FormatHistory]:
    """The format of each layer over the steps.

    From the layers that the run began with and the events since then; where nobody wrote these
    down, from the formats in the statistics.

    Returns:
        By layer, in the order of the model; empty if nothing is recorded.
    """
    if not records.layers:
        return _from_statistics(records)
    histories = {layer.name: [(records.starts[0].step, layer.format)] for layer in records.layers}

    def change(step: int, layer: str, format: str) -> None:
        history = histories.setdefault(layer, [(records.starts[0].step, format)])
        if history[-1][1] == format:
            return
        if history[-1][0] >= step:  # two changes between the same two steps: the last one counts
            history.pop()
        if not history or history[-1][1] != format:
            history.append((step, format))

    def apply(events: Iterable[FormatChange]) -> None:
        for event in events:
            for layer, (_, after) in event.formats.items():
                change(event.step, layer, after)

    events = format_changes(records.events)
    for start in records.starts[1:]:
        apply(event for event in events if event.step <= start.step)
        events = [event for event in events if event.step > start.step]
        for layer in start.layers:
            change(start.step, layer.name, layer.format)
    apply(events)
    return {layer: tuple(history) for layer, history in histories.items()}


def is_low(format: str) -> bool:
    """Whether a format's name means low precision; of one that is not known, yes."""
    if format == HIGH:
        return False
    try:
        return not linear_format(format).is_high_precision
    except ValueError:
        return True


def ever_low(records: RunRecords) -> bool:
    """Whether some layer was in low precision for a step, as far as the records go."""
    for history in format_histories(records).values():
        ends = [step for step, _ in history[1:]] + [records.last_step]
        if any(is_low(f) and end > at for (at, f), end in zip(history, ends, strict=True)):
            return True
    return False


def last_formats(records: RunRecords) -> dict[str, str]:
    """Each layer's format at the end, or as far as the records go."""
    return {layer: history[-1][1] for layer, history in format_histories(records).items()}


def layer_groups(histories: Mapping[str, FormatHistory], most: int = 200) -> list[LayerGroup]:
    """Layers with equal histories in one row each.

    Neighbours are grouped; where that leaves many rows, all layers of one history.

    Args:
        histories: what `format_histories` returned.
        most: rows at most; those that changed most often are kept.
    """
    neighbours: list[tuple[FormatHistory, list[str]]] = []
    for layer, history in histories.items():
        if neighbours and neighbours[-1][0] == history:
            neighbours[-1][1].append(layer)
        else:
            neighbours.append((history, [layer]))
    if len(neighbours) > _MANY:
        same: dict[FormatHistory, list[str]] = {}
        for layer, history in histories.items():
            same.setdefault(history, []).append(layer)
        neighbours = list(same.items())
    groups = [LayerGroup(layers=tuple(names), history=history) for history, names in neighbours]
    if len(groups) > most:
        kept = sorted(groups, key=lambda group: -len(group.history))[:most]
        groups = [group for group in groups if group in kept]
    return groups


def steps_away_from(
    histories: Mapping[str, FormatHistory], events: Sequence[Event], last: int
) -> list[tuple[int, int]]:
    """Stretches of steps in which a demotion or a limit kept some layer in a safer format.

    Args:
        histories: only their layers count; all if there are none.
        events: those of the run.
        last: the last step.

    Returns:
        First step without and last step with it, by stretch.
    """
    away: dict[str, str] = {}
    stretches: list[tuple[int, int]] = []
    begun = 0
    for event in sorted(format_changes(events), key=lambda event: event.step):
        was_away = bool(away)
        for layer, (before, after) in event.formats.items():
            if histories and layer not in histories:
                continue
            if event.kind in ("demote", "limit"):
                away.setdefault(layer, before)
            elif away.get(layer) == after or event.kind == "promote":
                away.pop(layer, None)
        if away and not was_away:
            begun = event.step
        elif was_away and not away and event.step > begun:
            stretches.append((begun, event.step))
    if away and last > begun:
        stretches.append((begun, last))
    return stretches


def _from_statistics(records: RunRecords) -> dict[str, FormatHistory]:
    digest = records.statistics
    if digest is None:
        return {}
    histories: dict[str, FormatHistory] = {}
    for layer, row in zip(digest.layers, digest.formats.tolist(), strict=True):
        history: list[tuple[int, str]] = []
        for (first, _), code in zip(digest.columns, row, strict=True):
            format = digest.format_names[code] if code >= 0 else HIGH
            if not history or history[-1][1] != format:
                history.append((first if history else 0, format))
        histories[layer] = tuple(history)
    return histories


def repeats_stage(event: Event) -> bool:
    """Whether it is a write of the stage that begins at the same step."""
    return type(event) is FormatChange and event.reason.startswith("rollout stage")
