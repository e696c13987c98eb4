"""What is said of an incident: its decisions as events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lightning_fp.events import (
    Demotion,
    Event,
    LayerClimb,
    Note,
    Replayed,
    Rollback,
    SkippedStep,
    StateChange,
    Suspicion,
    Tier,
    UnprovenClimb,
    Verdict,
)
from lightning_fp.layers import LinearFormat
from lightning_fp.stability.accounting import Accounting
from lightning_fp.stability.detect.decision import Decision
from lightning_fp.stability.judge.conviction import Conclusion
from lightning_fp.stability.questions import Climb, Climbed
from lightning_fp.stability.replay.gap import Gap
from lightning_fp.stability.respond.attribution import Attribution
from lightning_fp.stability.respond.verdict import Judgement

DRY_RUN = "dry run: nothing was changed"


def skipped(step: int, layer: str | None, loss: float | None = None) -> SkippedStep:
    """A step was left out.

    Args:
        step: which.
        layer: in which backward overflowed first, if that is known.
        loss: the step's, if that is known.
    """
    first = "" if layer is None else f" (first that of {layer})"
    return SkippedStep(
        step=step,
        reason=f"a gradient was inf or NaN{first}: the optimizer step was skipped",
        numbers={} if loss is None else {"loss": loss},
        layers=() if layer is None else (layer,),
    )


def changed(step: int, before: str, after: str, reason: str) -> Iterator[Event]:
    """The fallback went from one state to another, if it did."""
    if before != after:
        yield StateChange(step=step, before=before, after=after, reason=reason)


def suspicion(step: int, decision: Decision, *, skips: int, overflow: str | None) -> Suspicion:
    """Loss or gradient norm left their range, or gradients that of FP16."""
    measured = {
        "onset": decision.onset,
        "baseline": decision.baseline,
        "noise": decision.noise,
        "score": decision.score,
    }
    known = {name: float(value) for name, value in measured.items() if value is not None}
    reason = decision.reason
    if skips and decision.kind in ("ok", "skip"):
        reason = f"{skips} steps in a row were skipped because of inf or NaN"
    return Suspicion(
        step=step,
        reason=reason if overflow is None else overflow,
        numbers={"skips": float(skips), **known},
        action="replay in high precision",
    )


def probe_suspicion(step: int, error: float, usual: float) -> Suspicion:
    """A probe's gradients were out of the usual."""
    return Suspicion(
        step=step,
        reason=f"the gradients' error is {error:.0%} against high precision (usually {usual:.0%})",
        numbers={"grad_error": error, "usual": usual},
        action="replay in high precision",
    )


def skip_suspicion(step: int, batch: int) -> Suspicion:
    """A single step was left out."""
    reason = f"batch {batch} gave inf or NaN, and its step was skipped"
    return Suspicion(step=step, reason=reason, action="replay in high precision")


def gap_suspicion(step: int, gap: Gap) -> Suspicion:
    """Batches on the weights of now, out of the usual."""
    action = "replay in high precision"
    return Suspicion(step=step, reason=gap.sentence, numbers=gap.numbers, action=action)


def verdicts(step: int, conclusion: Conclusion) -> Iterator[Event]:
    """What the replays measured, and what it means."""
    tiers: Sequence[tuple[Tier, Judgement | None]] = (
        ("one step", conclusion.one_step),
        ("gap", conclusion.gap),
        ("trajectory", conclusion.trajectory),
        ("control", conclusion.control),
    )
    for tier, verdict in tiers:
        if verdict is None:
            continue
        yield Replayed(step=step, reason=tier, numbers=verdict.numbers)
        if tier != "gap" or verdict.finding == "precision":  # a gap acquits nobody
            yield Verdict(
                step=step,
                reason=verdict.reason,
                numbers=verdict.numbers,
                verdict=verdict.finding,
                tier=tier,
            )


def attribution(step: int, found: Attribution) -> Replayed:
    """Who is to blame."""
    worst = sorted(found.cast_errors.items(), key=lambda item: -item[1])[:4]
    return Replayed(
        step=step,
        reason=(
            "these layers, alone in low precision, cause most of the gradients' error"
            if found.culprits
            else "the gradients' error does not come from a few layers"
        ),
        numbers={
            "grad_error": found.error,
            "grad_error_without": found.rest,
            **{f"alone/{name}": error for name, error in found.culprits.items()},
            **{f"cast_error/{name}": error for name, error in worst},
        },
        layers=tuple(found.culprits),
    )


def demoted(
    step: int,
    before: Mapping[str, str],
    formats: Mapping[str, LinearFormat],
    reason: str,
    *,
    dry_run: bool,
) -> Demotion:
    """Layers are given a safer format, or would be."""
    return Demotion(
        step=step,
        reason=reason,
        formats={name: (before[name], format.name) for name, format in formats.items()},
        action=DRY_RUN if dry_run else "",
    )


def climbed(climb: Climb, to: Climbed, *, dry_run: bool) -> Iterator[Event]:
    """A layer climbed a rung, if there is one."""
    over = climb.excess
    numbers = {} if over is None else {over.statistic: over.value, "limit": over.limit}
    if to.after is not None:
        kind = LayerClimb if climb.proved else UnprovenClimb
        yield kind(
            step=climb.at,
            reason=climb.reason,
            numbers=numbers,
            formats={climb.layer: (to.before, to.after)},
            action=DRY_RUN if dry_run else "",
        )


def rolled_back(step: int, to_step: int, replayed: int) -> Rollback:
    """The run goes back."""
    reason = (
        "the run goes on from the replay of the same batches in high precision"
        if replayed
        else "the run goes on with new data, and the batches since then are lost"
    )
    return Rollback(step=step, to_step=to_step, replayed=replayed, reason=reason)


def tried_high_precision(step: int, outcome: str) -> Note:
    """Whether a step in high precision fits into memory."""
    does = "fits into memory" if outcome == "done" else f"does not work here: {outcome}"
    text = f"a step with all layers in high precision {does}"
    if outcome != "done":
        text = f"{text}; verdicts that need such a step will be unclear"
    return Note(step=step, reason=text)


def all_high(step: int) -> Note:
    """A suspicion that no format can explain."""
    text = "every layer is in high precision already: precision is not to blame"
    return Note(step=step, reason=f"{text}; look at the data and the learning rate")


def not_healed(layers: int) -> str:
    """What high precision is for layers that keep their frozen weights in FP8 alone."""
    one = layers == 1
    return (
        f"{layers} frozen {'layer keeps its weight' if one else 'layers keep their weights'} only"
        " in FP8: high precision, in replays and after a fallback, computes with the rounded"
        f" {'weight' if one else 'weights'} and cannot undo what rounding did"
    )


def still_misbehaves(step: int, decision: Decision) -> Note:
    """High precision, for good, misbehaves too."""
    text = f"the run misbehaves in high precision too ({decision.reason}): look at the data"
    return Note(step=step, reason=f"{text}, the learning rate and the hardware")


def failed(step: int, error: str) -> Note:
    """A replay raised."""
    return Note(step=step, reason=f"an investigation failed; training continues: {error}")


def ended(step: int, steps: Accounting) -> Note:
    """What became of the steps."""
    counts: Sequence[tuple[str, int]] = (
        ("attempted", steps.attempted),
        ("useful", steps.useful),
        ("skipped", steps.skipped),
        ("rolled_back", steps.rolled_back),
        ("made_good", steps.made_good),
        ("replayed", steps.replayed),
    )
    numbers = {name: float(count) for name, count in counts}
    return Note(step=step, reason=steps.sentence(), numbers=numbers)
