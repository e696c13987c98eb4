"""The format of every layer over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lightning_fp.records import Event, FormatChange
from lightning_fp.report.read.run_records import RunRecords

HIGH = "high precision"
"""What a layer is in where the statistics have no row of it."""

FormatCourse: TypeAlias = tuple[tuple[int, str], ...]
"""From which step on which format, ascending."""

_MANY = 40
"""Rows up to which layers are grouped only with their neighbours."""


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers that had the same formats at the same time."""

    layers: tuple[str, ...]
    course: FormatCourse

    @property
    def label(self) -> str:
        """The layer's name, or the first one's and how many more."""
        more = len(self.layers) - 1
        return f"{self.layers[0]} and {more} more" if more else self.layers[0]


def changed_formats(event: Event) -> bool:
    """Whether an event changed a format: in a dry run it only says what it would have done."""
    return isinstance(event, FormatChange) and not event.action.startswith("dry run")


def format_courses(records: RunRecords) -> dict[str, FormatCourse]:
    """The format of each layer over the steps.

    From the layers that the run began with and the events since then; where nobody wrote these
    down, from the formats in the statistics.

    Returns:
        By layer, in the order of the model; empty if nothing is recorded.
    """
    if not records.layers:
        return _from_statistics(records)
    courses = {layer.name: [(records.starts[0].step, layer.format)] for layer in records.layers}

    def change(step: int, layer: str, format: str) -> None:
        course = courses.setdefault(layer, [(records.starts[0].step, format)])
        if course[-1][1] == format:
            return
        if course[-1][0] >= step:  # two changes between the same two steps: the last one counts
            course.pop()
        if not course or course[-1][1] != format:
            course.append((step, format))

    events = [event for event in records.events if changed_formats(event)]
    for start in records.starts[1:]:
        for event in [e for e in events if e.step <= start.step]:
            _apply(event, change)
        events = [event for event in events if event.step > start.step]
        for layer in start.layers:
            change(start.step, layer.name, layer.format)
    for event in events:
        _apply(event, change)
    return {layer: tuple(course) for layer, course in courses.items()}


def last_formats(records: RunRecords) -> dict[str, str]:
    """Each layer's format at the end, or as far as the records go."""
    return {layer: course[-1][1] for layer, course in format_courses(records).items()}


def layer_groups(courses: Mapping[str, FormatCourse], most: int = 200) -> list[LayerGroup]:
    """Layers with equal courses in one row each.

    Neighbours are grouped; where that leaves many rows, all layers of one course.

    Args:
        courses: what `format_courses` returned.
        most: rows at most; those that changed most often are kept.
    """
    neighbours: list[tuple[FormatCourse, list[str]]] = []
    for layer, course in courses.items():
        if neighbours and neighbours[-1][0] == course:
            neighbours[-1][1].append(layer)
        else:
            neighbours.append((course, [layer]))
    if len(neighbours) > _MANY:
        same: dict[FormatCourse, list[str]] = {}
        for layer, course in courses.items():
            same.setdefault(course, []).append(layer)
        neighbours = list(same.items())
    groups = [LayerGroup(layers=tuple(names), course=course) for course, names in neighbours]
    if len(groups) > most:
        kept = sorted(groups, key=lambda group: -len(group.course))[:most]
        groups = [group for group in groups if group in kept]
    return groups


def steps_away_from(
    courses: Mapping[str, FormatCourse], events: Sequence[Event], last: int
) -> list[tuple[int, int]]:
    """Stretches of steps in which a demotion or a limit kept some layer in a safer format.

    Args:
        courses: only their layers count; all if there are none.
        events: those of the run.
        last: the last step.

    Returns:
        First step without and last step with it, by stretch.
    """
    away: dict[str, str] = {}
    stretches: list[tuple[int, int]] = []
    begun = 0
    for event in sorted(events, key=lambda event: event.step):
        if not (isinstance(event, FormatChange) and changed_formats(event)):
            continue
        was_away = bool(away)
        for layer, (before, after) in event.formats.items():
            if courses and layer not in courses:
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


def _apply(event: Event, change: object) -> None:
    assert isinstance(event, FormatChange) and callable(change)
    for layer, (_, after) in event.formats.items():
        change(event.step, layer, after)


def _from_statistics(records: RunRecords) -> dict[str, FormatCourse]:
    digest = records.statistics
    if digest is None:
        return {}
    courses: dict[str, FormatCourse] = {}
    for layer, row in zip(digest.layers, digest.formats.tolist(), strict=True):
        course: list[tuple[int, str]] = []
        for (first, _), code in zip(digest.columns, row, strict=True):
            format = digest.format_names[code] if code >= 0 else HIGH
            if not course or course[-1][1] != format:
                course.append((first if course else 0, format))
        courses[layer] = tuple(course)
    return courses
