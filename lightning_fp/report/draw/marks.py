"""Events as marks on charts and as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_fp.records import Event, Replayed, Rollback
from lightning_fp.report.draw.parts import Table

WORDS: Mapping[str, str] = {
    "stage": "stage",
    "gate": "gate",
    "format": "format",
    "skip": "skipped",
    "suspect": "suspicion",
    "verdict": "verdict",
    "demote": "demotion",
    "limit": "layer limit",
    "unproven": "unproven climb",
    "rollback": "rollback",
    "promote": "promotion",
    "resumed": "resume",
    "watch_failed": "unprotected",
}
"""What the kinds of events are called, in the order of the lanes beneath a curve."""

_IN_TABLE: Mapping[str, str] = {
    **WORDS,
    "started": "start",
    "replay": "blame",
    "rehearsal": "rehearsal",
    "note": "note",
}
_MARKS = 250
"""Marks of a lane at most; neighbours are drawn as one."""

_ROWS = 150
"""Rows of the table at most."""


def lanes(events: Sequence[Event], last: int) -> list[dict[str, Any]]:
    """One lane for each kind of event that happened.

    Args:
        events: those of the run.
        last: the last step.

    Returns:
        What charts.js draws beneath the curves: a name, a kind, marks from step to end.
    """
    found: list[dict[str, Any]] = []
    for kind, word in WORDS.items():
        marks = [_mark(event) for event in events if event.kind == kind]
        if marks:
            near = 1 if kind == "skip" else 0
            marks = _joined(marks, near)
            if len(marks) > _MARKS:
                marks = _joined(marks, max(1, last // _MARKS))
            found.append({"name": word, "kind": kind, "marks": marks})
    return found


def events_table(events: Sequence[Event]) -> Table:
    """What happened, in words."""
    rows: list[list[str]] = []
    skips: list[int] = []

    def skipped() -> None:
        if skips:
            many = f"{len(skips)} steps were left out, the last at step {skips[-1]}"
            text = many if len(skips) > 1 else "the step was left out"
            reason = "a gradient was inf or NaN"
            rows.append([f"{skips[0]:,}", WORDS["skip"], f"{text}: {reason}"])
            skips.clear()

    for event in events:
        if event.kind == "skip":
            if skips and event.step > skips[-1] + 1:
                skipped()
            skips.append(event.step)
            continue
        skipped()
        if event.kind in _IN_TABLE and not (isinstance(event, Replayed) and not event.layers):
            rows.append([f"{event.step:,}", _IN_TABLE[event.kind], said(event)])
    skipped()
    more = len(rows) - _ROWS
    if more > 0:
        rows = [*rows[: _ROWS // 2], ["", "", f"... {more} more ..."], *rows[-_ROWS // 2 :]]
    return Table(
        title="",
        columns=("step", "what", "why"),
        rows=rows,
        numbers=frozenset({0}),
        note="All of it is in events.jsonl." if rows else "",
    )


def said(event: Event) -> str:
    """The event's sentence without its step and kind."""
    text = event.sentence().removeprefix(f"step {event.step}: ")
    return text.removeprefix(event.kind).lstrip(": ") if event.kind != "replay" else _blame(event)


def errors_alone(event: Event) -> dict[str, float]:
    """By layer, the gradients' error with it alone in low precision, if that was measured."""
    parts = [(name.partition("/"), value) for name, value in event.numbers.items()]
    return {layer: value for (what, _, layer), value in parts if what == "alone"}


def _blame(event: Event) -> str:
    errors = [f"{layer} {value:.2f}" for layer, value in errors_alone(event).items()]
    return f"{event.reason}: {', '.join(errors) or ', '.join(event.layers)}"


def _mark(event: Event) -> dict[str, Any]:
    begin = event.to_step if isinstance(event, Rollback) else event.step
    mark: dict[str, Any] = {"step": begin, "end": event.step, "text": said(event), "count": 1}
    if event.kind == "gate":
        mark["failed"] = not getattr(event, "passed", True)
    return mark


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
