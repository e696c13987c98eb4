"""Events as marks beneath curves, with a key to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_fp.counting import counted
from lightning_fp.records import Event, GateResult, Rollback, Suspicion
from lightning_fp.report.draw.sentences import conclusion, said
from lightning_fp.report.read.format_history import repeats_stage
from lightning_fp.report.read.incidents import incidents

LANES: Mapping[str, Mapping[str, str]] = {
    "rollout": {
        "stage": "a stage of the rollout begins",
        "gate": "gate passed",
        "gate_failed": "gate failed",
    },
    "incidents": {
        "fault": "incident: {low} at fault",
        "innocent": "incident: {low} not at fault",
        "open": "alarm or incident, not decided",
        "watch_failed": "unprotected from here on",
    },
    "layers": {
        "safer": "layers get a safer format",
        "promote": "layers get their format back",
        "format": "formats changed otherwise",
    },
    "steps": {
        "rollback": "steps undone",
        "skip": "steps skipped",
        "resumed": "run resumed",
    },
}
"""The lanes from top to bottom: what is marked in each, and what the key says to it."""

_SHAPES: Mapping[str, str] = {
    "stage": "stage",
    "demote": "safer",
    "limit": "safer",
    "unproven": "safer",
    "promote": "promote",
    "format": "format",
    "rollback": "rollback",
    "skip": "skip",
    "resumed": "resumed",
    "watch_failed": "watch_failed",
    "suspect": "open",
}
"""By kind of event."""

_FINDINGS = {"precision": "fault", "not precision": "innocent"}

_MARKS = 250
"""Marks of a shape at most; neighbours are drawn as one."""


def lanes(events: Sequence[Event], last: int, low: str = "low precision") -> list[dict[str, Any]]:
    """The lanes in which something happened.

    Args:
        events: those of the run.
        last: the last step.
        low: what the low precision of the run is called.

    Returns:
        What charts.js draws beneath the curves: a name, a key, marks from step to end.
    """
    marks = list(_marks(events, low))
    found: list[dict[str, Any]] = []
    for lane, shapes in LANES.items():
        drawn: list[dict[str, Any]] = []
        key: list[dict[str, str]] = []
        for shape, words in shapes.items():
            some = _joined([mark for mark in marks if mark["shape"] == shape], shape == "skip")
            if len(some) > _MARKS:
                some = _joined(some, max(1, last // _MARKS))
            if some:
                drawn += some
                key.append({"shape": shape, "name": words.format(low=low)})
        if drawn:
            found.append({"name": lane, "key": key, "marks": drawn})
    return found


def undone(events: Sequence[Event]) -> list[list[int]]:
    """The stretches of steps that the run went back over, first and last step.

    Args:
        events: those of the run.
    """
    return [[event.to_step, event.step] for event in events if isinstance(event, Rollback)]


def undone_in_words(events: Sequence[Event]) -> str:
    """What the hatched steps of a chart are; "" if none were undone.

    Args:
        events: those of the run.
    """
    back = [event for event in events if isinstance(event, Rollback)]
    if not back:
        return ""
    steps = " and ".join(f"{event.to_step:,} to {event.step:,}" for event in back[:3])
    more = f" and {counted(len(back) - 3, 'more stretch', 'more stretches')}" if back[3:] else ""
    again = any(event.replayed for event in back)
    instead = "their repetition in high precision" if again else "what came instead"
    drawn = f"Hatched: steps {steps}{more} as they were before they were undone"
    return f"{drawn}; {instead} is not shown."


def _marks(events: Sequence[Event], low: str) -> Iterator[dict[str, Any]]:
    looked_into = incidents(events)
    inside = {id(event) for incident in looked_into for event in incident.events}
    for incident in looked_into:
        shape = _FINDINGS.get(incident.finding, "open")
        yield _mark(shape, incident.step, incident.step, conclusion(incident, low))
    for event in events:
        if isinstance(event, Suspicion) and id(event) in inside:
            continue
        if repeats_stage(event):
            continue
        shape = _SHAPES.get(event.kind, "")
        if isinstance(event, GateResult):
            shape = "gate" if event.passed else "gate_failed"
        begin = event.to_step if isinstance(event, Rollback) else event.step
        if shape:
            yield _mark(shape, begin, event.step, said(event, low))


def _mark(shape: str, step: int, end: int, text: str) -> dict[str, Any]:
    return {"shape": shape, "step": step, "end": end, "text": text, "count": 1}


def _joined(marks: Sequence[dict[str, Any]], near: int) -> list[dict[str, Any]]:
    """Marks closer than `near` steps become one."""
    found: list[dict[str, Any]] = []
    for mark in sorted(marks, key=lambda mark: mark["step"]):
        if near and found and mark["step"] - found[-1]["end"] <= near:
            found[-1]["end"] = max(found[-1]["end"], mark["end"])
            found[-1]["count"] += mark["count"]
        else:
            found.append(dict(mark))
    return found
