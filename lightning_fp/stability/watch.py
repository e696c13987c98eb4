"""The watch over a run, as one pure machine: from signals to orders, without a training loop.

It composes the detector, the overflow watch, probes, layer limits and the fallback's policy, and
asks one case at a time until there is a verdict. Who drives it tells it what happens, answers its
questions with replays, carries its orders out, and writes its events down.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_fp.events import Event, Note, Promotion
from lightning_fp.layers import LinearFormat
from lightning_fp.stability import incident_events as tell
from lightning_fp.stability.actions import (
    Action,
    Answer,
    Answered,
    Asked,
    Attempted,
    Boundary,
    Climb,
    Climbed,
    DropRecords,
    Ended,
    Failed,
    FormatsChanged,
    GoBack,
    Happening,
    HighPrecisionTried,
    LookAgain,
    Looked,
    Probed,
    ProbeStep,
    Promote,
    Promoted,
    Question,
    Settled,
    StepSeen,
    Surveyed,
    TakeSnapshot,
    Write,
)
from lightning_fp.stability.conviction import Case, Conclusion, Evidence
from lightning_fp.stability.detect.decision import Cause, Decision
from lightning_fp.stability.detect.detector import DivergenceDetector
from lightning_fp.stability.detect.overflow_watch import OverflowState, OverflowWatch
from lightning_fp.stability.inquiry import Inquiry, answered, open_case
from lightning_fp.stability.loss_scaling import LossScaling
from lightning_fp.stability.respond.demotion import demotion
from lightning_fp.stability.respond.fallback_policy import (
    Fallback,
    FallbackPolicy,
    FallbackState,
    Signals,
)
from lightning_fp.stability.respond.limits import LayerLimit, LimitWatch
from lightning_fp.stability.respond.probe import Probe
from lightning_fp.stability.respond.verdict import Anomaly
from lightning_fp.stability.watch_state import WatchState, from_plain, to_plain

CLAMPING_BITS = -1.0
"""Headroom below which a step under delayed scaling asks for statistics of the next: its largest
value was twice what the scale holds."""


@dataclass
class _Turn:
    """What one happening leads to, while it is being worked out."""

    state: WatchState
    actions: list[Action] = field(default_factory=list[Action])
    events: list[Event] = field(default_factory=list[Event])

    def enter(self, step: int, fallback: FallbackState, reason: str) -> None:
        """The fallback's next state, told if it is another phase."""
        before = self.state.fallback.phase
        self.events += tell.changed(step, before, fallback.phase, reason)
        self.state = replace(self.state, fallback=fallback)


class Watch:
    """Decides; pure: old states stay usable.

    Args:
        detector: what is suspicious in loss and gradient norm.
        policy: how long to wait, and how often to try.
        limit: how much a layer's casts may lose; None sets no limits.
        probe: when to compare gradients without a suspicion; None never does.
        layers: how many layers there are, for the budget of climbs.
        loss_scaling: how the loss scale of FP16 moves, if there is one.
        dry_run: whether only to say what would be done.
    """

    def __init__(
        self,
        detector: DivergenceDetector | None = None,
        *,
        policy: FallbackPolicy | None = None,
        limit: LayerLimit | None = None,
        probe: Probe | None = None,
        layers: int = 0,
        loss_scaling: LossScaling | None = None,
        dry_run: bool = False,
    ) -> None:
        self.detector = DivergenceDetector() if detector is None else detector
        self.fallback = Fallback(policy)
        self.probe = probe
        self.limits = None if limit is None else LimitWatch(limit, layers)
        self.loss_scaling = loss_scaling
        self.dry_run = dry_run

    def init(self) -> WatchState:
        """Warming up."""
        return WatchState()

    def step(
        self, state: WatchState, happening: Happening
    ) -> tuple[WatchState, list[Action], list[Event]]:
        """Take in what has happened.

        Args:
            state: where the watch stands.
            happening: a signal, or the answer to the one question that is open.

        Returns:
            The new state; what is to be done now, in this order: orders, and questions whose
            answers are to be told at once; and what is to be written down before that.
        """
        turn = _Turn(state)
        match happening:
            case Attempted():
                self._count(turn, attempted=1)
            case StepSeen():
                self._seen(turn, happening)
            case FormatsChanged(layers=layers):
                self._forget(turn, layers)
                self._formats_changed(turn)
            case Looked():
                self._looked(turn, happening)
            case Boundary(at=at, sound=sound):
                if self.limits is not None and sound and self._armed(turn):
                    watching = self.limits.watching(turn.state.limits)
                    turn.actions += [LookAgain()] if watching else []
                self._probe_if_due(turn, at)
            case Settled(at=at):
                # A state with the fault in it is no place to go back to.
                if turn.state.calm and turn.state.fallback.phase != "suspect":
                    turn.actions.append(TakeSnapshot(at=at))
            case Asked(at=at, onset=onset, risen=risen):
                self._look_into(turn, at, onset, risen=risen)
            case HighPrecisionTried(at=at, outcome=outcome):
                self._count(turn, replayed=1)
                turn.events.append(tell.tried_high_precision(at, outcome))
            case Ended(at=at, unseen=unseen):
                for seen in unseen:
                    self._count_skipped(turn, seen)
                turn.events.append(tell.ended(at, turn.state.steps))
            case Answered(question=question, answer=answer):
                self._told(turn, question, answer)
        return turn.state, turn.actions, turn.events

    # -- signals --------------------------------------------------------------------------------

    def _seen(self, turn: _Turn, seen: StepSeen) -> None:
        """One step's signals, and the case that they may open."""
        signals, state = seen.signals, turn.state
        overflows, overflow = self._see_overflow(state.overflows, seen)
        detected, decision = self.detector.step(
            state.detected,
            loss=signals.loss,
            grad_norm=signals.grad_norm,
            lr=signals.lr,
            skipped=signals.skipped,
        )
        turn.state = replace(
            state,
            detected=detected,
            overflows=overflows,
            calm=decision.kind == "ok",
            anomaly=Anomaly(baseline=decision.baseline, noise=decision.noise),
        )
        self._count_skipped(turn, seen)
        clamping = signals.headroom is not None and signals.headroom < CLAMPING_BITS
        if clamping and self.limits is not None:
            turn.actions.append(LookAgain())
        self._follow_policy(turn, seen, decision, overflow)

    def _count_skipped(self, turn: _Turn, seen: StepSeen) -> None:
        if not seen.signals.skipped:
            turn.state = replace(turn.state, skips=0)
            return
        self._count(turn, skipped=1)
        turn.state = replace(turn.state, skips=turn.state.skips + 1)
        turn.events.append(tell.skipped(seen))

    def _follow_policy(
        self, turn: _Turn, seen: StepSeen, decision: Decision, overflow: str | None
    ) -> None:
        step, before = seen.at, turn.state.fallback
        suspicious = decision.kind in ("suspect", "diverged")
        skips = turn.state.skips
        if seen.half:  # a scale that falls skips steps
            skips = max(skips, self.fallback.policy.max_skips + 1) if overflow else 0
        signals = Signals(
            step=step,
            armed=decision.baseline is not None and decision.cause is not Cause.LEARNING,
            suspicious=suspicious,
            onset=None if decision.onset is None else seen.signals.step - decision.onset,
            skips=skips,
        )
        after, action = self.fallback.step(before, signals)
        turn.enter(step, after, decision.reason)
        if action == "promote":
            reason = f"{self.fallback.hold(after)} steps of probation are over"
            formats = tuple(after.demoted.items())
            turn.actions.append(Promote(at=step, formats=formats, reason=reason))
        elif action == "investigate":
            turn.events.append(
                tell.suspicion(step, decision, skips=turn.state.skips, overflow=overflow)
            )
            self._look_into(turn, step, after.onset, risen=True, overflow=overflow)
        elif before.phase == "permanent" and suspicious and not turn.state.misbehaving:
            turn.events.append(tell.still_misbehaves(step, decision))
            turn.state = replace(turn.state, misbehaving=True)

    def _see_overflow(
        self, state: OverflowState, seen: StepSeen
    ) -> tuple[OverflowState, str | None]:
        """Under FP16: why overflows are more than a matter of the loss scale, if they are."""
        if self.loss_scaling is None or not seen.half:
            return OverflowState(), None
        loss = seen.signals.loss
        watch = OverflowWatch(self.loss_scaling, self.fallback.policy.max_skips)
        return watch.step(
            state,
            skipped=seen.signals.skipped,
            loss_finite=loss is None or math.isfinite(loss),
            stuck=seen.signals.skipped and seen.stuck,
        )

    def _looked(self, turn: _Turn, look: Looked) -> None:
        """Layers over their limits climb."""
        if self.limits is not None and look.sound and self._armed(turn):
            limits, climbing = self.limits.step(turn.state.limits, look.excesses, look.names)
            turn.state = replace(turn.state, limits=limits)
            turn.actions += [Climb(at=look.at, excess=excess) for excess in climbing]

    @staticmethod
    def _armed(turn: _Turn) -> bool:
        return turn.state.fallback.phase not in ("warmup", "permanent")

    def _probe_if_due(self, turn: _Turn, step: int) -> None:
        """Compare one step's gradients with high precision, if it is time."""
        state, fallback = turn.state, turn.state.fallback
        ready = fallback.phase in ("healthy", "probation") and step >= fallback.quiet_until
        if self.probe is not None and ready and state.calm and self.probe.due(state.probed, step):
            turn.actions.append(ProbeStep(at=step))

    def _probed(self, turn: _Turn, step: int, error: float | None) -> None:
        probe, state = self.probe or Probe(), turn.state
        before = state.probed
        turn.state = replace(state, probed=probe.seen(before, step, error))
        if error is None or not probe.suspicious(before, error):
            return
        turn.events.append(tell.probe_suspicion(step, error, probe.usual(before)))
        # Between two probes nobody has looked: it may have begun right after the last good one.
        onset = step if before.healthy is None else before.healthy
        signals = Signals(step=step, armed=True, suspicious=True, onset=onset)
        after, _ = self.fallback.step(state.fallback, signals)
        turn.enter(step, after, "a probe is out of the usual")
        self._look_into(turn, step, after.onset, risen=False)

    # -- a case ---------------------------------------------------------------------------------

    def _look_into(
        self,
        turn: _Turn,
        step: int,
        onset: int | None,
        *,
        risen: bool,
        overflow: str | None = None,
    ) -> None:
        """Open a case, unless one is open."""
        if turn.state.inquiry is not None:
            return
        case = Case(
            step=step,
            onset=step if onset is None else onset,
            anomaly=turn.state.anomaly,
            healthy_error=(self.probe or Probe()).usual(turn.state.probed),
            risen=risen,
            overflow=overflow,
        )
        self._ask(turn, open_case(case))

    def _ask(self, turn: _Turn, inquiry: Inquiry) -> None:
        turn.state = replace(turn.state, inquiry=inquiry)
        turn.actions.append(inquiry.question)

    def _told(self, turn: _Turn, question: Question[Any], answer: Answer) -> None:
        """An answer; what it is about follows from its question."""
        self._count(turn, replayed=answer.replays)
        match question, answer:
            case Climb(at=at), Climbed():
                turn.events += tell.climbed(at, answer, dry_run=self.dry_run)
                if answer.after is not None and not self.dry_run:
                    self._formats_changed(turn)
            case Promote(at=at, reason=reason), Promoted(formats=formats):
                turn.events.append(Promotion(step=at, reason=reason, formats=formats))
                turn.enter(at, self.fallback.promoted(turn.state.fallback, at), reason)
                self._formats_changed(turn)
            case ProbeStep(at=at), Probed(error=error):
                self._probed(turn, at, error)
            case ProbeStep(at=at), Failed(error=error):
                turn.events.append(tell.failed(at, error))
                self._probed(turn, at, None)
            case _:
                self._evidence(turn, question, answer)

    def _evidence(self, turn: _Turn, question: Question[Any], answer: Answer) -> None:
        inquiry = turn.state.inquiry
        if inquiry is None or inquiry.question != question:
            return
        turn.state = replace(turn.state, inquiry=None)
        if isinstance(answer, Failed):
            step = inquiry.case.step
            turn.events.append(tell.failed(step, answer.error))
            unclear = self.fallback.unclear(turn.state.fallback, step)
            turn.state = replace(turn.state, fallback=unclear)
            return
        outcome = answered(inquiry, answer)
        if isinstance(outcome, Inquiry):
            self._ask(turn, outcome)
        else:
            self._close(turn, inquiry.evidence.told(question, answer), outcome)

    # -- verdicts -------------------------------------------------------------------------------

    def _close(self, turn: _Turn, evidence: Evidence, conclusion: Conclusion) -> None:
        step = evidence.case.step
        turn.events += tell.verdicts(step, conclusion)
        if conclusion.finding == "precision":
            self._convict(turn, evidence, conclusion)
        elif conclusion.finding == "unclear":
            unclear = self.fallback.unclear(turn.state.fallback, step)
            turn.state = replace(turn.state, fallback=unclear)
        else:
            self._acquit(turn, evidence, conclusion)

    def _acquit(self, turn: _Turn, evidence: Evidence, conclusion: Conclusion) -> None:
        step = evidence.case.step
        if evidence.survey.low:
            text = f"precision is left alone; {conclusion.likeness}"
            turn.events.append(Note(step=step, reason=text))
            if conclusion.finding == "not reproducible":
                turn.actions.append(DropRecords())
        else:
            turn.events.append(tell.all_high(step))
        acquitted = self.fallback.acquitted(turn.state.fallback, step)
        turn.enter(step, acquitted, "precision is not to blame")
        state = turn.state
        turn.state = replace(state, detected=self.detector.cleared(state.detected))
        if not evidence.case.risen and self.probe is not None:
            # an error that does no harm is what is usual from here on
            turn.state = replace(turn.state, probed=self.probe.accept(state.probed))

    def _convict(self, turn: _Turn, evidence: Evidence, conclusion: Conclusion) -> None:
        """Demote, and go on from where high precision would be."""
        step, survey, fallback = evidence.case.step, evidence.survey, turn.state.fallback
        formats, reason = self._demotion(fallback, survey, conclusion)
        turn.events += tell.changed(step, fallback.phase, "attribute", "precision is to blame")
        if conclusion.attribution is not None:
            turn.events.append(tell.attribution(step, conclusion.attribution))
        turn.events += tell.changed(step, "attribute", "demote", reason)
        before = {name: survey.low[name] for name in formats}
        turn.events.append(tell.demoted(step, before, formats, reason, dry_run=self.dry_run))
        if not self.dry_run:
            turn.actions.append(Write(formats=formats, reason=reason))
            self._go_back(turn, step, survey, conclusion)
        after = self.fallback.convicted(fallback, step, before)
        hold = f"for {self.fallback.hold(after)} steps"
        final = after.phase == "permanent"
        turn.events += tell.changed(step, "demote", after.phase, "for good" if final else hold)
        turn.state = replace(turn.state, fallback=after)
        if not self.dry_run:
            self._forget(turn, after.demoted)
            self._formats_changed(turn)
            turn.state = replace(turn.state, skips=0)

    def _demotion(
        self, fallback: FallbackState, survey: Surveyed, conclusion: Conclusion
    ) -> tuple[dict[str, LinearFormat], str]:
        found = conclusion.attribution
        return demotion(
            {} if found is None else found.formats,
            low=survey.low,
            high=survey.high,
            demoted=fallback.demoted,
            scope=self.fallback.scope(fallback),
            final=self.fallback.gives_up(fallback),
            whole=survey.whole,
        )

    def _go_back(self, turn: _Turn, step: int, survey: Surveyed, conclusion: Conclusion) -> None:
        """Take over the trajectory in high precision, or else the snapshot before the fault."""
        start, high = conclusion.start, conclusion.high
        none_made = survey.losses is not None and survey.skipped == len(survey.losses)
        if start is None or (high is None and survey.finite and none_made):
            return  # nothing was made with what was wrong
        undone = step - start
        self._count(
            turn,
            rolled_back=undone,
            undone=undone - survey.skipped,
            made_good=0 if high is None else conclusion.made,
        )
        made_good = 0 if high is None else conclusion.made
        turn.actions.append(GoBack(start=start, instead=high))
        turn.events.append(tell.rolled_back(step, start, made_good))
        detected = self.detector.rolled_back(turn.state.detected)
        turn.state = replace(turn.state, detected=detected, calm=True)

    # -- bookkeeping ----------------------------------------------------------------------------

    def _forget(self, turn: _Turn, layers: Collection[str]) -> None:
        """What was seen of layers whose formats were changed is void."""
        if self.limits is not None:
            limits = self.limits.forget(turn.state.limits, layers)
            turn.state = replace(turn.state, limits=limits)

    def _formats_changed(self, turn: _Turn) -> None:
        detected = self.detector.precision_changed(turn.state.detected)
        turn.state = replace(turn.state, detected=detected)

    @staticmethod
    def _count(turn: _Turn, **more: int) -> None:
        steps = turn.state.steps
        counts = {name: getattr(steps, name) + count for name, count in more.items()}
        turn.state = replace(turn.state, steps=replace(steps, **counts))

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self, state: WatchState) -> dict[str, Any]:
        """As plain numbers, strings, lists and dicts, for a checkpoint; between two steps."""
        return to_plain(state, self.detector)

    def load_state_dict(self, saved: Mapping[str, Any]) -> WatchState:
        """The state that `state_dict` was made of.

        Raises:
            ValueError: if it is of another version.
        """
        return from_plain(saved, self.detector)
