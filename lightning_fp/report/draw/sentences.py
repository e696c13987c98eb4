"""What the report says of single events and of incidents, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_fp.counting import counted
from lightning_fp.records import (
    Event,
    FormatChange,
    GateResult,
    Note,
    Replayed,
    Rollback,
    Started,
    Verdict,
)
from lightning_fp.records.events import Rehearsed, Resumed, SkippedStep, Suspicion
from lightning_fp.report.read.incidents import Finding, Incident
from lightning_fp.statistic_names import share

_TESTS: Mapping[str, str] = {
    "one step": "one batch, again in {low} and in high precision",
    "gap": "losses of the last batches, in {low} and in high precision",
    "trajectory": "the steps since the snapshot, trained again in high precision",
    "control": "the same steps, trained again in {low}",
}
"""What each test of an incident does."""

_ANSWERS: Mapping[Finding, str] = {
    "precision": "blames {low}",
    "not precision": "clears {low}",
    "unclear": "says too little",
    "not reproducible": "does not repeat what was recorded",
    "compiled code": "blames the compiled code",
}

_CONCLUSIONS: Mapping[Finding, str] = {
    "precision": "{low} was at fault",
    "not precision": "{low} was not at fault",
    "unclear": "Not decided",
    "not reproducible": "What went wrong could not be repeated",
    "compiled code": "The compiled code was at fault, not {low}",
}

_WAYS = 2
"""Pairs of formats that a sentence names; of more it says only where layers went."""

_NAMED = 3
"""Layers that a sentence names; of more it gives the number."""


def layers_named(layers: Sequence[str]) -> str:
    """The names of a few layers, or how many there are.

    >>> layers_named(["up", "down"]), layers_named(["a", "b", "c", "d"])
    ('up and down', '4 layers')
    """
    if len(layers) > _NAMED:
        return counted(len(layers), "layer")
    return listed(layers)


def listed(words: Sequence[str]) -> str:
    """Words in a row.

    >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])
    ('a', 'a and b', 'a, b and c')
    """
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def moved(formats: Mapping[str, tuple[str, str]]) -> str:
    """Who went from which format to which.

    >>> moved({"up": ("fp8-delayed", "fp32"), "down": ("fp8-delayed", "fp32")})
    'up and down went from fp8-delayed to fp32'

    Args:
        formats: by layer, the format before and after.
    """
    ways: dict[tuple[str, str], list[str]] = {}
    for layer, way in formats.items():
        ways.setdefault(way, []).append(layer)
    if len(ways) > _WAYS:
        after = dict.fromkeys(after for _, after in ways)
        return f"{counted(len(formats), 'layer')} went to {listed(list(after))}"
    parts = [
        f"{layers_named(layers)} went from {before} to {after}"
        for (before, after), layers in ways.items()
    ]
    return ", ".join(parts)


def went_back(event: Rollback) -> str:
    """What a rollback did with the steps since the snapshot.

    Args:
        event: the rollback.
    """
    undone = event.step - event.to_step
    lost = undone - event.replayed
    back = f"the run went back to step {event.to_step:,}"
    if not event.replayed:
        return f"{back}; {counted(undone, 'step')} since then are lost, it goes on with new data"
    again = counted(event.replayed, "step")
    rest = f"; {lost:,} are lost" if lost else ""
    return f"{back} and trained the {again} since then again, in high precision{rest}"


def conclusion(incident: Incident, low: str) -> str:
    """What an incident came to, and what was done about it.

    Args:
        incident: all its events.
        low: what the low precision of the run is called.
    """
    what = _CONCLUSIONS[incident.finding].format(low=low)
    if incident.provisional:
        what = f"{low} has done no harm so far"
    found = f"{what}: {incident.why}. "
    demotion, rollback = incident.demotion, incident.rollback
    if demotion is not None and demotion.action:
        return f"{found}A dry run: nothing was changed, else {moved(demotion.formats)}."
    done = [] if demotion is None else [moved(demotion.formats)]
    done += [] if rollback is None else [went_back(rollback)]
    if done:
        return f"{found}So {', and '.join(done)}."
    stay = "No format was changed"
    return f"{found}{stay}; {incident.likeness}." if incident.likeness else f"{found}{stay}."


def evidence(incident: Incident, low: str) -> list[str]:
    """What an incident's conclusion rests on, test by test.

    Args:
        incident: all its events.
        low: what the low precision of the run is called.
    """
    found: list[str] = []
    tests = 0
    for event in incident.events:
        if isinstance(event, Suspicion):
            found.append(f"alarm: {alarm(event)}")
        elif isinstance(event, Verdict):
            tests += 1
            test = _TESTS.get(event.tier, event.tier).format(low=low)
            answer = _ANSWERS[event.verdict].format(low=low)
            found.append(f"test {tests} ({test}) {answer}: {event.reason}")
        elif isinstance(event, Replayed) and (
            event.layers or "grad_error_without" in event.numbers
        ):
            found.append(f"who: {event.reason}{_blamed(event)}")
    return found


def alarm(suspicion: Suspicion) -> str:
    """What was unusual, without what the loop was advised to do.

    Args:
        suspicion: that raised it.
    """
    what, _, advice = suspicion.reason.partition(": ")
    figures = advice.partition(" (")[2]
    return f"{what} ({figures}" if figures else what


def said(event: Event, low: str = "low precision") -> str:
    """An event's reason in plain words, without its step and kind.

    Args:
        event: of any kind but the parts of an incident.
        low: what the low precision of the run is called.
    """
    if isinstance(event, Rehearsed):
        return _TRIALS[event.outcome]
    if isinstance(event, Started):
        return "PrecisionFallback watches from here on" + (f"; {event.action}" * bool(event.action))
    if isinstance(event, Resumed):
        return f"the run went on from the checkpoint of step {event.step:,}"
    if isinstance(event, SkippedStep | Note):
        return event.reason
    if isinstance(event, Replayed):
        return f"{event.reason}{_blamed(event)}"
    if isinstance(event, Rollback):
        return went_back(event)
    parts = [event.reason, event.action]
    if isinstance(event, FormatChange):
        parts[0] = f"{moved(event.formats)}: {event.reason}"
    elif isinstance(event, GateResult):
        parts[0] = f"{'passed' if event.passed else 'failed'}: {event.reason}"
    elif isinstance(event, Verdict):
        conclusions = _CONCLUSIONS[event.verdict].format(low=low)
        parts[0] = f"{conclusions[0].lower()}{conclusions[1:]}: {event.reason}"
    return "; ".join(part for part in parts if part).replace(" -> ", " to ")


def errors_alone(event: Event) -> dict[str, float]:
    """By layer, the gradients' error with it alone in low precision, if that was measured."""
    parts = [(name.partition("/"), value) for name, value in event.numbers.items()]
    return {layer: value for (what, _, layer), value in parts if what == "alone"}


_TRIALS: Mapping[str, str] = {
    "passed": "a few steps were replayed on trial and left nothing behind: incidents can be"
    " replayed and undone",
    "one step": "a few steps were replayed on trial, and longer replays left something behind: only"
    " single steps are replayed from here on",
    "limits only": "a few steps were replayed on trial, and that does not work here: nothing is"
    " replayed, layers are only held to their limits",
}
"""What follows from a rehearsal."""


def _blamed(event: Event) -> str:
    errors = [f"{layer} {share(value)}" for layer, value in errors_alone(event).items()]
    every = event.numbers.get("grad_error")
    if every is not None:
        errors.append(f"all layers together {share(every)}")
    return f": {', '.join(errors)}" if errors else ""
