"""What raises a suspicion besides the loss, and the case that it opens.

A fault need not show in the loss to do harm. So steps are looked at whose casts are out of the
usual, or that were left out; now and then a step's gradients are compared with high precision; and
what was acquitted is asked about again. All of it within the replay budget.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean

from lightning_fp.stability import incident_events as tell
from lightning_fp.stability.detect.cast_trigger import CastTrigger
from lightning_fp.stability.happenings import AmaxSeen, StepSeen
from lightning_fp.stability.judge.by_gap import explains, gap_of
from lightning_fp.stability.judge.evidence import Case
from lightning_fp.stability.judge.inquiry import open_case
from lightning_fp.stability.questions import (
    Answer,
    CompareLosses,
    LossesCompared,
    Probed,
    ProbeStep,
)
from lightning_fp.stability.replay.budget import ReplayBudget
from lightning_fp.stability.replay.gap import BATCHES
from lightning_fp.stability.respond.attribution import HEALTHY_ERROR
from lightning_fp.stability.respond.fallback_policy import MOST_DOUBLINGS, Fallback
from lightning_fp.stability.respond.open_cases import OpenCases
from lightning_fp.stability.respond.probe import FIRST, Probe
from lightning_fp.stability.respond.verdict import Anomaly
from lightning_fp.stability.turn import Turn
from lightning_fp.stability.watch_state import WatchState

SKIP_LOOK = 5
"""What it takes to look at one batch, as batches forward: three whole steps."""

RECENT = 4
"""Steps for which a probe says that a state is sound; its answer comes two steps later."""

WORST = 2
"""Batches of the most unusual casts that an attribution looks at besides the last."""


class Suspicions:
    """Asks for looks and probes, and opens cases of what they show.

    Args:
        fallback: states, waits and counts.
        probe: when to compare gradients without a suspicion; None never does.
        budget: how much may be replayed.
    """

    def __init__(self, fallback: Fallback, probe: Probe | None, budget: ReplayBudget) -> None:
        self._fallback, self._probe, self._budget = fallback, probe, budget
        self._open_cases, self._trigger = OpenCases(), CastTrigger()

    def amax_seen(self, turn: Turn, seen: AmaxSeen) -> None:
        """A step whose casts are out of the usual: compare its batch."""
        state = turn.state
        before = self._trigger.init(len(seen.amax)) if state.casts is None else state.casts
        if before.recent.shape[1:] != seen.amax.shape:
            before = self._trigger.init(len(seen.amax))
        casts, jumps = self._trigger.step(before, seen.step, seen.amax)
        turn.state = replace(state, casts=casts)
        if jumps and self._probe is not None and turn.armed and self._may_look(turn, 1):
            turn.actions.append(CompareLosses(at=seen.at, batch=seen.step))

    def left_out(self, turn: Turn, seen: StepSeen) -> None:
        """A single step was left out: does its batch have inf or NaN in high precision too?

        Where a format overflows now and then, no loss rises; the run merely loses these steps, one
        in ten of them 2% of a loss. Under FP16 a loss scale that is tried does the same.
        """
        state = turn.state
        alone = seen.signals.skipped and state.skips == 1 and not seen.half
        ready = turn.armed and seen.at >= state.skip_look_next
        if not (alone and ready and self._may_look(turn, SKIP_LOOK)):
            return
        wait = FIRST * 2 ** min(state.skip_looks, MOST_DOUBLINGS)
        turn.state = replace(state, skip_looks=state.skip_looks + 1, skip_look_next=seen.at + wait)
        step = seen.signals.step
        turn.events.append(tell.skip_suspicion(seen.at, step))
        after = self._fallback.suspected(turn.state.fallback, seen.at, step)
        turn.enter(seen.at, after, "a step was skipped")
        self.look_into(turn, seen.at, step, risen=False, batch=step, left_out=True)

    def look_or_probe(self, turn: Turn, step: int) -> None:
        """Ask again about an open case, or compare one step's gradients, if it is time."""
        state, fallback = turn.state, turn.state.fallback
        due = self._open_cases.due(state.cases, step, risen=not state.calm)
        if due and self._may_look(turn, BATCHES):
            turn.actions.append(CompareLosses(at=step, count=BATCHES))
            if self._probe is not None and fallback.phase == "probation" and state.calm:
                turn.actions.append(ProbeStep(at=step, coming=True))
            return
        if self._probe is not None and self._probe.due(state.probed, step):
            self._probe_step(turn, step)

    def looks_first(self, turn: Turn, step: int) -> bool:
        """Ask for a probe before the only snapshot gives way to one of now, if none was made yet.

        Between two probes a fault may have begun, and with the old snapshot the way back is gone.
        """
        last = turn.state.probed.last
        recent = last is not None and step - last <= RECENT
        return self._probe is not None and not recent and self._probe_step(turn, step)

    def _probe_step(self, turn: Turn, step: int) -> bool:
        """Ask for the coming step's gradients, if the run is calm and the budget suffices."""
        state, steps = turn.state, turn.state.steps
        ready = state.calm and state.fallback.phase in ("healthy", "probation")
        asks = ready and self._budget.affords_probe(
            steps=steps.attempted, replayed=steps.replayed, probes=state.probed.count
        )
        if asks:
            turn.actions.append(ProbeStep(at=step, coming=True))
        return asks

    def _may_look(self, turn: Turn, batches: int) -> bool:
        """Whether the budget has room for a look that no case asks for."""
        steps = turn.state.steps
        return self._budget.affords_look(
            steps=steps.attempted, replayed=steps.replayed, batches=batches
        )

    def probed(self, turn: Turn, question: ProbeStep, probed: Probed) -> None:
        """A probe; what one batch shows, the one before it has to show too."""
        probe, state, step = self._probe or Probe(), turn.state, question.at
        before, error = state.probed, probed.error
        if probed.of_step and error is not None and probe.suspicious(before, error):
            # Replays decide: hooks may have written into the gradients of the step itself.
            turn.actions.append(ProbeStep(at=step))
            return
        if question.ago:
            self._probed_again(turn, step, error)
            return
        turn.state = replace(state, probed=probe.seen(before, step, error, probed.norm))
        if error is None:
            return
        if not probe.suspicious(before, error):
            # A format that was too coarse from the first step on has the errors that are usual, but
            # may cost loss all the same: so where they are large already, the first probe asks
            # several batches.
            coarse = before.count == 0 and error > HEALTHY_ERROR
            dear = coarse or self._is_dear(state, probed)
            if dear and self._may_look(turn, BATCHES):
                turn.actions.append(CompareLosses(at=step, count=BATCHES))
            return
        if step < state.harmless_until:
            if self._may_look(turn, BATCHES):
                turn.actions.append(CompareLosses(at=step, count=BATCHES))
            return
        turn.state = replace(turn.state, probed=replace(turn.state.probed, suspicion=error))
        if math.isfinite(error):
            turn.actions.append(ProbeStep(at=step, ago=1))
        else:
            self._suspect_probed(turn, step)

    def _probed_again(self, turn: Turn, step: int, error: float | None) -> None:
        """The batch before: its gradients may be as usual, when one batch had the net at an edge.

        Twice in a row that is no chance.
        """
        probe, probed = self._probe or Probe(), turn.state.probed
        alone = error is not None and not probe.suspicious(probed, error)
        if alone and probed.alone == 0:
            turn.state = replace(turn.state, probed=replace(probed, alone=1))
        else:
            self._suspect_probed(turn, step)

    def _suspect_probed(self, turn: Turn, step: int) -> None:
        probed = turn.state.probed
        usual = (self._probe or Probe()).usual(probed)
        turn.events.append(tell.probe_suspicion(step, probed.suspicion, usual))
        # Between two probes nobody has looked: it may have begun right after the last good one.
        onset = step if probed.healthy is None else probed.healthy
        self._suspect(turn, step, onset, "a probe has unusual gradients", by_probe=True)

    @staticmethod
    def _is_dear(state: WatchState, probed: Probed) -> bool:
        """Whether the batch's loss is far from high precision's."""
        if probed.losses is None:
            return False
        low, high = probed.losses
        one = LossesCompared(losses=(low,), high_losses=(high,))
        return gap_of(one, state.anomaly).alarming

    def compared(self, turn: Turn, question: CompareLosses, answer: Answer) -> None:
        """A look at what was acquitted so far: by then, does it do harm?"""
        state, step = turn.state, question.at
        if not isinstance(answer, LossesCompared) or not answer.losses:
            return
        gap = gap_of(answer, state.anomaly)
        if question.batch is not None:
            if gap.convicts:
                turn.events.append(tell.gap_suspicion(step, gap))
                self._suspect(turn, step, question.batch, "a cast is unusual", question.batch)
            return
        rise, onset = self._rise(state), self._open_cases.onset(state.cases, step)
        looked = self._open_cases.looked(state.cases, step, gap, fmean(answer.losses))
        turn.state = replace(state, cases=looked)
        if rise is not None:
            # Weights that something else has damaged make every format's errors larger.
            suspicious = gap.convicts and explains(answer, rise)
        else:
            suspicious = gap.convicts or (gap.alarming and step >= state.harmless_until)
        if suspicious:
            turn.events.append(tell.gap_suspicion(step, gap))
            self._suspect(turn, step, onset, "the last batches are unusual", rise=rise)

    @staticmethod
    def _rise(state: WatchState) -> Anomaly | None:
        """What is left to explain of a rise that was not precision's, while its case is open."""
        cases = state.cases
        if cases.began is None or cases.baseline is None:
            return None
        return replace(state.anomaly, baseline=cases.baseline, noise=cases.noise)

    def _suspect(
        self,
        turn: Turn,
        step: int,
        onset: int,
        reason: str,
        batch: int | None = None,
        rise: Anomaly | None = None,
        *,
        by_probe: bool = False,
    ) -> None:
        """Something other than the loss is suspicious; after an unclear verdict it waits."""
        fallback = turn.state.fallback
        waits = fallback.phase == "suspect" and step < fallback.quiet_until and batch is None
        if waits or fallback.phase == "permanent":
            return
        on_probation = by_probe and fallback.phase == "probation"
        after = self._fallback.suspected(fallback, step, onset)
        turn.enter(step, after, reason)
        self.look_into(
            turn,
            step,
            after.onset,
            risen=rise is not None,
            batch=batch,
            anomaly=rise,
            on_probation=on_probation,
        )

    def look_into(
        self,
        turn: Turn,
        step: int,
        onset: int | None,
        *,
        risen: bool,
        overflow: str | None = None,
        batch: int | None = None,
        left_out: bool = False,
        anomaly: Anomaly | None = None,
        on_probation: bool = False,
    ) -> None:
        """Open a case, unless one is open."""
        if turn.state.inquiry is not None:
            return
        steps, casts = turn.state.steps, turn.state.casts
        case = Case(
            unusual=() if casts is None else self._trigger.worst(casts, WORST),
            budget=self._budget.left(steps=steps.attempted, replayed=steps.replayed),
            step=step,
            onset=step if onset is None else onset,
            anomaly=turn.state.anomaly if anomaly is None else anomaly,
            healthy_error=(self._probe or Probe()).usual(turn.state.probed),
            healthy_norm=turn.state.probed.norm,
            risen=risen,
            overflow=overflow,
            batch=batch,
            left_out=left_out,
            on_probation=on_probation,
        )
        turn.ask(open_case(case))
