"""A run told in a few plain sentences, from its events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from lightning_fp.counting import counted
from lightning_fp.records import (
    Event,
    FormatChange,
    GateResult,
    StageChange,
    Suspicion,
)
from lightning_fp.records.events import Rehearsed
from lightning_fp.report.draw.sentences import alarm, conclusion, layers_named, listed, moved, said
from lightning_fp.report.read.format_history import format_changes, format_histories, is_low
from lightning_fp.report.read.incidents import Incident, incidents
from lightning_fp.report.read.run_records import RunRecords
from lightning_fp.report.sections.answer import name_of_low

_MOST = 5
"""Sentences between the beginning and the end."""

_QUIET = 0.1
"""Share of the run from which on nothing happening is worth saying."""


@dataclass(frozen=True, kw_only=True)
class _Happening:
    """One event, or several of a kind that followed each other."""

    step: int

    kind: str
    """Neighbours of one kind are told together."""

    events: tuple[Event, ...]

    incident: Incident | None = None


def story(records: RunRecords) -> list[str]:
    """Three to seven sentences: how the run began, what happened, how it ended.

    Args:
        records: the run's; with events.
    """
    told = _together(_happenings(records))
    most = _MOST if len(told) <= _MOST else _MOST - 1
    ranked = sorted(range(len(told)), key=lambda i: (_WEIGHTS[told[i].kind], i))
    kept = [told[i] for i in sorted(ranked[:most])]
    low = name_of_low(records)
    sentences = [_beginning(records), *(_TELL[each.kind](each, low) for each in kept)]
    if more := len(told) - len(kept):
        sentences.append(f"Besides, {counted(more, 'more thing')} happened: see the table.")
    if not told:
        sentences.append(_nothing(records))
    return [*sentences, _ending(records, told)]


# -- what happened --------------------------------------------------------------------------------


def _happenings(records: RunRecords) -> Iterator[_Happening]:
    """Event by event; an incident is one, and the writes of a stage are the stage's."""
    cases = {incident.step: incident for incident in incidents(records.events)}
    changes = {id(event) for event in format_changes(records.events)}
    names: list[str] = []
    for step, group in groupby(records.events, key=lambda event: event.step):
        together = tuple(group)
        case = cases.get(step)
        stage = next((event for event in together if isinstance(event, StageChange)), None)
        failed = tuple(e for e in together if isinstance(e, GateResult) and not e.passed)
        inside = () if case is None else case.events
        if stage is not None:
            writes = tuple(event for event in together if type(event) is FormatChange)
            first, back = not names, stage.stage in names
            names += [name for name in (stage.previous, stage.stage) if name and name not in names]
            kind = "begun" if first else "back" if back else "stage"
            yield _Happening(step=step, kind=kind, events=(stage, *writes, *failed))
        if case is not None:
            kind = _KINDS_OF_INCIDENTS.get(case.finding, "open")
            yield _Happening(step=step, kind=kind, events=case.events, incident=case)
        for event in together:
            if any(event is part for part in inside) or (stage and type(event) is FormatChange):
                continue
            kind = _kind(event, id(event) in changes)
            told = kind == "alarm" and any(
                isinstance(other, FormatChange) and other.reason == event.reason
                for other in together
            )
            if kind and not told:
                yield _Happening(step=step, kind=kind, events=(event,))


_KINDS_OF_INCIDENTS = {"precision": "fault", "not precision": "innocent"}


def _kind(event: Event, changed: bool) -> str:
    if isinstance(event, Rehearsed) and event.outcome == "passed":
        return ""
    if isinstance(event, FormatChange) and not changed:  # in a dry run
        return ""
    return _KINDS.get(event.kind, "")


_KINDS = {
    "limit": "limit",
    "unproven": "unproven",
    "promote": "promoted",
    "format": "format",
    "rehearsal": "confined",
    "skip": "skip",
    "watch_failed": "failed",
    "resumed": "resumed",
    "suspect": "alarm",
}


def _together(happenings: Iterable[_Happening]) -> list[_Happening]:
    """Neighbours of one kind as one."""
    found: list[_Happening] = []
    for kind, group in groupby(happenings, key=lambda each: each.kind):
        row = list(group)
        if kind in ("fault", "failed", "back", "confined", "begun"):  # each is worth a sentence
            found += row
            continue
        events = tuple(event for each in row for event in each.events)
        found.append(
            _Happening(step=row[0].step, kind=kind, events=events, incident=row[0].incident)
        )
    return [each for each in found if each.kind != "begun"]


# -- how it is told -------------------------------------------------------------------------------


def _stages(of: _Happening, low: str) -> str:
    """The stages of a rollout that put more layers into low precision."""
    parts: list[str] = []
    for event in of.events:
        if isinstance(event, StageChange):
            writes = [e for e in of.events if type(e) is FormatChange and e.step == event.step]
            what = ", ".join(map(_given, writes)) or "no layer changed"
            parts.append(f"at step {event.step:,} stage {event.stage!r} began ({what})")
    return _sentence("the rollout went on: " + ", ".join(parts))


def _given(write: FormatChange) -> str:
    after = Counter(format for _, format in write.formats.values())
    return " and ".join(f"{counted(n, 'layer')} to {format}" for format, n in after.items())


def _back(of: _Happening, low: str) -> str:
    stage = next(event for event in of.events if isinstance(event, StageChange))
    failed = [event.reason for event in of.events if isinstance(event, GateResult)]
    writes = [event for event in of.events if type(event) is FormatChange]
    why = f"a gate of the rollout failed: {failed[0]}" if failed else stage.reason
    what = ", ".join(map(_given, writes)) or "no layer changed"
    return _sentence(f"{_at([of.step])} {why}; so it went back to {stage.stage!r} ({what})")


def _fault(of: _Happening, low: str) -> str:
    incident = of.incident
    if incident is None:
        return ""
    raised = incident.suspicion
    what = "replays were asked again" if raised is None else f"there was an alarm: {alarm(raised)}"
    return f"{_sentence(f'{_at([of.step])} {what}')} {conclusion(incident, low)}"


def _innocent(of: _Happening, low: str) -> str:
    steps = _steps(event for event in of.events if isinstance(event, Suspicion))
    if len(steps) > 1:
        return _sentence(
            f"{_at(steps)} something was unusual, and each time {low} was not at fault"
        )
    return _fault(of, low)


def _open(of: _Happening, low: str) -> str:
    steps = _steps(of.events)
    if len(steps) > 1:
        return _sentence(f"{_at(steps)} something was unusual, and no test could tell why")
    return _fault(of, low)


def _limits(of: _Happening, low: str) -> str:
    changes = [event for event in of.events if isinstance(event, FormatChange)]
    formats = {layer: way for event in changes for layer, way in event.formats.items()}
    first = changes[0].reason
    if len(changes) == 1:
        return _sentence(f"{_at([of.step])} {moved(formats)}: {first}")
    after = listed(list(dict.fromkeys(format for _, format in formats.values())))
    what = f"{layers_named(list(formats))} needed a safer format and went to {after}"
    return _sentence(f"{_at(_steps(changes))} {what}; the first: {first}")


def _unproven(of: _Happening, low: str) -> str:
    layers = {layer for event in of.events for layer in event.layers}
    moved_ = f"{counted(len(layers), 'layer')} got a safer format without proof"
    return _sentence(f"{_at(_steps(of.events))} {moved_}: nothing could be replayed")


def _promoted(of: _Happening, low: str) -> str:
    layers = list(dict.fromkeys(layer for event in of.events for layer in event.layers))
    verb = "its" if len(layers) == 1 else "their"
    return _sentence(f"{_at(_steps(of.events))} {layers_named(layers)} got {verb} format back")


def _formats(of: _Happening, low: str) -> str:
    changes = [event for event in of.events if isinstance(event, FormatChange)]
    return _sentence(f"{_at([of.step])} {moved(changes[-1].formats)}: {changes[-1].reason}")


def _skips(of: _Happening, low: str) -> str:
    many = len(of.events)
    were = "1 step was" if many == 1 else f"{many:,} steps were"
    return _sentence(f"{_at(_steps(of.events))} {were} skipped: a gradient was inf or NaN")


def _alarm(of: _Happening, low: str) -> str:
    more = "" if len(of.events) == 1 else f" (and {len(of.events) - 1:,} times more)"
    return _sentence(f"{_at([of.step])} there was an alarm{more}: {said(of.events[0], low)}")


def _failed(of: _Happening, low: str) -> str:
    return _sentence(f"{_at([of.step])} the watch failed, and the run went on unprotected")


def _confined(of: _Happening, low: str) -> str:
    return _sentence(f"{_at([of.step])} {said(of.events[0], low)}")


def _resumed(of: _Happening, low: str) -> str:
    return _sentence(f"{_at(_steps(of.events))} the run was resumed")


_TELL: dict[str, Callable[[_Happening, str], str]] = {
    "failed": _failed,
    "fault": _fault,
    "back": _back,
    "unproven": _unproven,
    "limit": _limits,
    "stage": _stages,
    "confined": _confined,
    "skip": _skips,
    "innocent": _innocent,
    "open": _open,
    "promoted": _promoted,
    "format": _formats,
    "alarm": _alarm,
    "resumed": _resumed,
}
"""By kind; of too many those are told that come first here."""

_WEIGHTS = {kind: i for i, kind in enumerate(_TELL)}


# -- beginning and end ----------------------------------------------------------------------------


def _beginning(records: RunRecords) -> str:
    histories = format_histories(records).values()
    if not histories:
        return "The formats at the beginning are not recorded."
    begun = Counter(history[0][1] for history in histories)
    stay = all(len(history) == 1 for history in histories)
    formats = " and ".join(f"{n:,} in {format}" for format, n in begun.most_common())
    layers = counted(len(histories), "layer")
    if len(begun) == 1:
        which = f"Its only layer was in {next(iter(begun))}"
        many = f"All {layers} were in {next(iter(begun))}"
        return f"{which if len(histories) == 1 else many} {_throughout(stay)}."
    return f"Of {layers} {formats} {_throughout(stay)}."


def _throughout(stay: bool) -> str:
    return "from the first step to the last" if stay else "at the beginning"


def _nothing(records: RunRecords) -> str:
    if any(event.kind == "started" for event in records.events):
        return "PrecisionFallback found nothing to change: no format changed, no step was undone."
    return "No format changed, and no step was undone."


def _ending(records: RunRecords, told: Sequence[_Happening]) -> str:
    last = records.last_step
    ends = [history[-1][1] for history in format_histories(records).values()]
    low = sum(map(is_low, ends))
    formats = f", with {low:,} of {counted(len(ends), 'layer')} in {name_of_low(records)}"
    formats = formats if told and ends else ""
    at = max((event.step for each in told for event in each.events), default=last)
    watched = all(each.kind != "failed" for each in told)
    calm = watched and last - at > _QUIET * last
    quiet = f"no decision followed after step {at:,}, and " if calm else ""
    ended = records.finished is not None
    end = f"the run ended at step {last:,}" if ended else f"the records break off at step {last:,}"
    return _sentence(f"{quiet}{end}{formats}")


def _steps(events: Iterable[Event]) -> list[int]:
    return list(dict.fromkeys(event.step for event in events))


def _at(steps: Sequence[int]) -> str:
    """When.

    >>> _at([3]), _at([3, 9]), _at([3, 5, 9])
    ('at step 3,', 'at steps 3 and 9,', 'from step 3 to step 9,')
    """
    if len(steps) == 1:
        return f"at step {steps[0]:,},"
    if len(steps) == 2:
        return f"at steps {steps[0]:,} and {steps[1]:,},"
    return f"from step {steps[0]:,} to step {steps[-1]:,},"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."
