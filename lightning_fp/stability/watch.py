"""The watch over a run, as one pure machine: from signals to orders, without a training loop.

It composes the detector, the overflow watch, probes, layer limits and the fallback's policy, and
asks one case at a time until there is a verdict. Who drives it tells it what happens, answers its
questions with replays, carries its orders out, and writes its events down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_fp.counting import counted
from lightning_fp.events import Event, Promotion
from lightning_fp.stability import incident_events as tell
from lightning_fp.stability.actions import Action, LookAgain, TakeSnapshot
from lightning_fp.stability.detect.decision import Cause, Decision
from lightning_fp.stability.detect.detector import DivergenceDetector
from lightning_fp.stability.detect.first_losses import learned, with_loss
from lightning_fp.stability.detect.overflow_watch import OverflowState, OverflowWatch
from lightning_fp.stability.happenings import (
    AmaxSeen,
    Answered,
    Asked,
    Attempted,
    Boundary,
    Ended,
    FormatsChanged,
    Happening,
    HighPrecisionTried,
    Looked,
    Settled,
    StepSeen,
)
from lightning_fp.stability.judge.inquiry import Inquiry, answered
from lightning_fp.stability.loss_scaling import LossScaling
from lightning_fp.stability.questions import (
    Answer,
    CheckCure,
    Climb,
    Climbed,
    CompareLosses,
    CureChecked,
    Failed,
    Probed,
    ProbeStep,
    Promote,
    Promoted,
    Question,
)
from lightning_fp.stability.replay.budget import ReplayBudget
from lightning_fp.stability.respond.fallback_policy import (
    Fallback,
    FallbackPolicy,
    Signals,
)
from lightning_fp.stability.respond.limits import LayerLimit, LimitWatch
from lightning_fp.stability.respond.open_cases import OpenCases
from lightning_fp.stability.respond.probe import Probe
from lightning_fp.stability.respond.verdict import Anomaly
from lightning_fp.stability.sentence import Sentence
from lightning_fp.stability.suspicions import Suspicions
from lightning_fp.stability.turn import Turn
from lightning_fp.stability.watch_state import WatchState, from_plain, to_plain

CLAMPING_BITS = -1.0
"""Headroom below which a step under delayed scaling asks for statistics of the next: its largest
value was twice what the scale holds."""


class Watch:
    """Decides; pure: old states stay usable.

    Args:
        detector: what is suspicious in loss and gradient norm.
        policy: how long to wait, and how often to try.
        limit: how much a layer's casts may lose; None sets no limits.
        probe: when to compare gradients without a suspicion; None never does.
        budget: how much may be replayed.
        act_without_proof: whether a suspicion climbs a rung where nothing can be replayed.
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
        budget: ReplayBudget | None = None,
        act_without_proof: bool = False,
        layers: int = 0,
        loss_scaling: LossScaling | None = None,
        dry_run: bool = False,
    ) -> None:
        self.detector = DivergenceDetector() if detector is None else detector
        self.fallback = Fallback(policy)
        self.probe = probe
        self.budget = ReplayBudget() if budget is None else budget
        self.limits = None if limit is None else LimitWatch(limit, layers)
        self.loss_scaling = loss_scaling
        self.dry_run = dry_run
        self._open_cases = OpenCases()
        self._suspicions = Suspicions(self.fallback, probe, self.budget)
        self._sentence = Sentence(
            self.fallback,
            self.detector,
            self.limits,
            probe or Probe(),
            self.budget,
            act_without_proof=act_without_proof,
            dry_run=dry_run,
        )

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
        turn = Turn(state)
        match happening:
            case Attempted():
                turn.count(attempted=1)
            case StepSeen():
                self._seen(turn, happening)
            case FormatsChanged(layers=layers):
                turn.formats_changed(self.detector, self.limits, layers)
            case Looked():
                self._looked(turn, happening)
            case AmaxSeen():
                self._suspicions.amax_seen(turn, happening)
            case Boundary(at=at, sound=sound):
                if self.limits is not None and sound and turn.armed:
                    watching = self.limits.watching(turn.state.limits)
                    turn.actions += [LookAgain()] if watching else []
                self._suspicions.look_or_probe(turn, at)
            case Settled(at=at, only=only):
                # A state with the fault in it is no place to go back to.
                calm = turn.state.calm and turn.state.fallback.phase != "suspect"
                if calm and not (only and self._suspicions.looks_first(turn, at)):
                    keep_from = self._open_cases.keep_from(turn.state.cases)
                    turn.actions.append(TakeSnapshot(at=at, keep_from=keep_from))
            case Asked(at=at, onset=onset, risen=risen):
                self._suspicions.look_into(turn, at, onset, risen=risen)
            case HighPrecisionTried(at=at, outcome=outcome):
                turn.count(replayed=1)
                turn.events.append(tell.tried_high_precision(at, outcome))
            case Ended(at=at, unseen=unseen):
                for seen in unseen:
                    self._count_skipped(turn, seen)
                turn.events.append(tell.ended(at, turn.state.steps))
            case Answered(question=question, answer=answer):
                self._told(turn, question, answer)
        return turn.state, turn.actions, turn.events

    # -- signals --------------------------------------------------------------------------------

    def _seen(self, turn: Turn, seen: StepSeen) -> None:
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
        first = with_loss(state.first_losses, signals.loss)
        turn.state = replace(
            state,
            detected=detected,
            overflows=overflows,
            calm=decision.kind == "ok",
            first_losses=first,
            anomaly=Anomaly(
                baseline=decision.baseline,
                noise=decision.noise,
                learned=learned(first, decision.baseline),
            ),
        )
        self._count_skipped(turn, seen)
        clamping = signals.headroom is not None and signals.headroom < CLAMPING_BITS
        if clamping and self.limits is not None:
            turn.actions.append(LookAgain())
        self._follow_policy(turn, seen, decision, overflow)
        self._suspicions.left_out(turn, seen)

    def _count_skipped(self, turn: Turn, seen: StepSeen) -> None:
        if not seen.signals.skipped:
            if turn.state.skips:
                turn.state = replace(turn.state, skips=0)
            return
        turn.count(skipped=1)
        turn.state = replace(turn.state, skips=turn.state.skips + 1)
        turn.events.append(tell.skipped(seen.signals.step, seen.overflowed, seen.signals.loss))

    def _follow_policy(
        self, turn: Turn, seen: StepSeen, decision: Decision, overflow: str | None
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
            reason = f"{counted(self.fallback.hold(after), 'step')} of probation are over"
            formats = tuple(after.demoted.items())
            turn.actions.append(Promote(at=step, formats=formats, reason=reason))
        elif action == "investigate":
            turn.events.append(
                tell.suspicion(step, decision, skips=turn.state.skips, overflow=overflow)
            )
            onset = after.onset
            if onset is not None and turn.state.cases.began is not None:
                onset = min(onset, self._open_cases.onset(turn.state.cases, step))
            self._suspicions.look_into(turn, step, onset, risen=True, overflow=overflow)
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

    def _looked(self, turn: Turn, look: Looked) -> None:
        """Layers over their limits climb; not while the loss is up, which moves casts as well.

        Nor while its level is being learned again, because the learning rate has risen, or because
        something else has raised the loss.
        """
        state = turn.state
        calm = state.calm and state.detected.loss.seen >= self.detector.armed
        if self.limits is not None and look.sound and calm and turn.armed:
            limits, climbing = self.limits.step(turn.state.limits, look.excesses, look.names)
            turn.state = replace(turn.state, limits=limits)
            turn.actions += [
                Climb(at=look.at, layer=each.layer, reason=each.sentence, excess=each)
                for each in climbing
            ]

    # -- a case ---------------------------------------------------------------------------------

    def _told(self, turn: Turn, question: Question[Any], answer: Answer) -> None:
        """An answer; what it is about follows from its question."""
        turn.count(replayed=answer.replays)
        match question, answer:
            case Climb(at=at, layer=layer), Climbed(after=after):
                turn.events += tell.climbed(question, answer, dry_run=self.dry_run)
                if after is not None and not self.dry_run:
                    turn.formats_changed(self.detector, self.limits)
                    if question.proved:
                        self._sentence.check_cure(turn, at, [layer])
            case CheckCure(), CureChecked():
                self._sentence.cure_checked(turn, question, answer)
            case CheckCure(at=at), Failed(error=error):
                turn.events.append(tell.failed(at, error))
            case CompareLosses(), _ if not self._is_evidence(turn, question):
                self._suspicions.compared(turn, question, answer)
            case Promote(at=at, reason=reason), Promoted(formats=formats):
                turn.events.append(Promotion(step=at, reason=reason, formats=formats))
                turn.enter(at, self.fallback.promoted(turn.state.fallback, at), reason)
                turn.formats_changed(self.detector, self.limits)
            case ProbeStep(), Probed():
                self._suspicions.probed(turn, question, answer)
            case ProbeStep(at=at), Failed(error=error):
                turn.events.append(tell.failed(at, error))
                self._suspicions.probed(turn, question, Probed(error=None))
            case _:
                self._evidence(turn, question, answer)

    def _is_evidence(self, turn: Turn, question: Question[Any]) -> bool:
        inquiry = turn.state.inquiry
        return inquiry is not None and inquiry.question == question

    def _evidence(self, turn: Turn, question: Question[Any], answer: Answer) -> None:
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
            turn.ask(outcome)
        else:
            self._sentence.close(turn, inquiry.evidence.told(question, answer), outcome)

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self, state: WatchState) -> dict[str, Any]:
        """For a checkpoint, between two steps: what `torch.load(weights_only=True)` takes."""
        return to_plain(state, self.detector)

    def load_state_dict(self, saved: Mapping[str, Any]) -> WatchState:
        """The state that `state_dict` was made of.

        Raises:
            ValueError: if it is of another version.
        """
        return from_plain(saved, self.detector)
