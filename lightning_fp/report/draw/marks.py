"""Events as marks on charts and as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_fp.counting import counted
from lightning_fp.records import Event, GateResult, Replayed, Rollback
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
    "replay": "replay",
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


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided at a step, with all that belongs to it."""

    step: int

    what: str
    """In a word."""

    why: str

    details: tuple[str, ...] = ()
    """Gates that were asked, replays, what followed: sentences."""


def decisions(events: Sequence[Event]) -> list[Decision]:
    """What happened, decision by decision.

    A stage that begins has its gates and formats in it, an incident its suspicion, verdict and
    rollback, and steps left out one after the other are one.
    """
    found: list[Decision] = []
    together: list[Event] = []

    def close() -> None:
        found.extend(_decided(together))
        together.clear()

    for event in events:
        if event.kind not in _IN_TABLE or (isinstance(event, Replayed) and not event.layers):
            continue
        if together and not _belongs(event, together[-1]):
            close()
        together.append(event)
    close()
    return found


def events_table(events: Sequence[Event]) -> Table:
    """What happened, in words: a row for each decision, its details in lines beneath."""
    rows = [
        [f"{d.step:,}", d.what, "\n".join((d.why, *d.details)) if d.details else d.why]
        for d in decisions(events)
    ]
    more = len(rows) - _ROWS
    if more > 0:
        rows = [*rows[: _ROWS // 2], ["", "", f"... {more} more ..."], *rows[-_ROWS // 2 :]]
    return Table(
        title="Decisions",
        columns=("step", "what", "why"),
        rows=rows,
        numbers=frozenset({0}),
        note="All of it is in events.jsonl." if rows else "",
        long=True,
    )


def _belongs(event: Event, last: Event) -> bool:
    if event.kind == last.kind == "skip":
        return event.step <= last.step + 1
    return event.step == last.step and "skip" not in (event.kind, last.kind)


_LEADING = (
    "watch_failed",
    "demote",
    "unproven",
    "stage",
    "verdict",
    "promote",
    "limit",
    "rollback",
)
"""Of what happened at one step, the first of these is the decision, and the rest its details."""


def _decided(events: Sequence[Event]) -> list[Decision]:
    """One decision, or several where nothing leads."""
    if not events:
        return []
    if events[0].kind == "skip":
        layers = events[0].layers
        what = "a gradient was inf or NaN" + (f" (first that of {layers[0]})" if layers else "")
        last = events[-1].step
        many = f"{counted(len(events), 'step')} were skipped, the last at step {last:,}"
        why = f"{many}: {what}" if len(events) > 1 else f"the step was skipped: {what}"
        return [Decision(step=events[0].step, what=WORDS["skip"], why=why)]
    leading = next((e for kind in _LEADING for e in events if e.kind == kind), None)
    if leading is None:
        kinds = dict.fromkeys(event.kind for event in events)
        return [_together([e for e in events if e.kind == kind]) for kind in kinds]
    told = [
        e for e in events if e is not leading and e.kind not in ("note", "rehearsal", "started")
    ]
    if leading.kind == "stage":  # the stage says how many layers change
        told = [e for e in told if e.kind != "format"]
    apart = [e for e in events if e is not leading and e not in told and e.kind != "format"]
    return [*(_together([event]) for event in apart), _together([leading, *told])]


def _detail(event: Event, of: Event) -> str:
    if event.kind == of.kind:
        return said(event)
    joint = " " if isinstance(event, GateResult) else ": "
    return f"{_IN_TABLE[event.kind]}{joint}{said(event)}"


def _together(events: Sequence[Event]) -> Decision:
    first = events[0]
    details = [_detail(event, first) for event in events[1:]]
    return Decision(
        step=first.step, what=_IN_TABLE[first.kind], why=said(first), details=tuple(details)
    )


def said(event: Event) -> str:
    """The event's sentence without its step and kind."""
    if isinstance(event, GateResult):
        parts = f"{'passes' if event.passed else 'fails'}: {event.reason}", event.action
        return "; ".join(part for part in parts if part)
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
    for mark in sorted(marks, key=lambda mark: (mark["step"], mark.get("failed", False))):
        if near and found and mark["step"] - found[-1]["end"] <= near:
            found[-1]["end"] = max(found[-1]["end"], mark["end"])
            found[-1]["count"] += mark["count"]
        else:
            found.append(dict(mark))
    return found
