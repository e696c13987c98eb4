"""What follows from a conclusion: an acquittal; or a demotion, the way back, and its check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_fp.events import Note, Replayed
from lightning_fp.stability import incident_events as tell
from lightning_fp.stability.actions import DropRecords, GoBack, Write
from lightning_fp.stability.detect.detector import DivergenceDetector
from lightning_fp.stability.judge.by_gap import gap_of
from lightning_fp.stability.judge.conviction import Conclusion
from lightning_fp.stability.judge.evidence import Evidence
from lightning_fp.stability.questions import CheckCure, Climb, CureChecked, Surveyed
from lightning_fp.stability.replay.budget import CURE, ReplayBudget
from lightning_fp.stability.respond.cure import verify_cure
from lightning_fp.stability.respond.demotion import demotion
from lightning_fp.stability.respond.fallback_policy import MOST_DOUBLINGS, Fallback
from lightning_fp.stability.respond.limits import LimitWatch
from lightning_fp.stability.respond.open_cases import OpenCases
from lightning_fp.stability.respond.probe import Probe
from lightning_fp.stability.turn import Turn


class Sentence:
    """Turns conclusions into orders.

    Args:
        fallback: states, waits and counts.
        detector: told when formats change, or the run goes back.
        limits: told when formats change; None where there are none.
        probe: knows what error of the gradients is usual.
        budget: how much may be replayed.
        act_without_proof: whether layers climb where nothing can be replayed.
        dry_run: whether only to say what would be done.
    """

    def __init__(
        self,
        fallback: Fallback,
        detector: DivergenceDetector,
        limits: LimitWatch | None,
        probe: Probe,
        budget: ReplayBudget,
        *,
        act_without_proof: bool = False,
        dry_run: bool,
    ) -> None:
        self.fallback, self.detector = fallback, detector
        self.limits, self.probe, self.dry_run = limits, probe, dry_run
        self.budget, self.act_without_proof = budget, act_without_proof

    def close(self, turn: Turn, evidence: Evidence, conclusion: Conclusion) -> None:
        step = evidence.case.step
        turn.events += tell.verdicts(step, conclusion)
        if conclusion.finding == "precision":
            self._convict(turn, evidence, conclusion)
        elif conclusion.finding == "unclear":
            self._wait(turn, evidence)
        else:
            self._acquit(turn, evidence, conclusion)

    def _wait(self, turn: Turn, evidence: Evidence) -> None:
        """Ask again later; where nothing will ever be proved, every layer may climb one rung."""
        step, fallback = evidence.case.step, turn.state.fallback
        if evidence.survey.replayable or not self.act_without_proof:
            unclear = self.fallback.unclear(fallback, step)
            turn.state = replace(turn.state, fallback=unclear)
            return
        reason = "a suspicion that cannot be checked here"
        turn.actions += [
            Climb(at=step, layer=name, reason=reason, proved=False) for name in evidence.survey.low
        ]
        acquitted = self.fallback.acquitted(fallback, step)
        turn.enter(step, acquitted, "layers have moved to safer formats, without proof")

    def _acquit(self, turn: Turn, evidence: Evidence, conclusion: Conclusion) -> None:
        step = evidence.case.step
        if evidence.survey.low:
            text = f"formats stay as they are; {conclusion.likeness}"
            if evidence.survey.stored:
                text = f"{text}; but {tell.not_healed(evidence.survey.stored)}"
            turn.events.append(Note(step=step, reason=text))
            if conclusion.finding == "not reproducible":
                turn.actions.append(DropRecords())
        else:
            turn.events.append(tell.all_high(step))
        firm = evidence.case.risen or conclusion.finding != "not precision"
        acquitted = self.fallback.acquitted(turn.state.fallback, step, firm=firm)
        turn.enter(step, acquitted, "precision is not to blame" if firm else "no harm so far")
        state = turn.state
        if firm:
            detected, cases = self.detector.cleared(state.detected), state.cases
            if evidence.survey.low and conclusion.finding == "not precision":
                # It may be followed by a fault of precision: its batches are asked about. Not where
                # something of one moment has damaged the weights, which makes every error larger.
                case = evidence.case
                cases = OpenCases().acquitted(cases, step, case.onset, case.anomaly.level)
            turn.state = replace(state, detected=detected, cases=cases)
            return
        # The error that raised the suspicion is as alarming as before; but what it does is asked of
        # the next batches forward, and of trajectories only after a while.
        wait = self.fallback.policy.grace * 2 ** min(state.harmless, MOST_DOUBLINGS)
        turn.state = replace(
            state,
            cases=OpenCases().acquitted(state.cases, step, evidence.case.onset),
            harmless=state.harmless + 1,
            harmless_until=step + wait,
        )

    def _convict(self, turn: Turn, evidence: Evidence, conclusion: Conclusion) -> None:
        """Demote, and go on from where high precision would be."""
        step, survey, fallback = evidence.case.step, evidence.survey, turn.state.fallback
        found = conclusion.attribution
        culprits = {} if found is None else found.formats
        case, demoted = evidence.case, set(fallback.demoted)
        one_more = (case.batch is not None or case.on_probation) and not set(culprits) & demoted
        formats, reason = demotion(
            culprits,
            low=survey.low,
            high=survey.high,
            demoted=fallback.demoted,
            scope="layers" if one_more else self.fallback.scope(fallback),
            final=self.fallback.gives_up(fallback) and not one_more,
            whole=survey.whole,
        )
        turn.events += tell.changed(step, fallback.phase, "attribute", "precision is to blame")
        if found is not None:
            turn.events.append(tell.attribution(step, found))
        turn.events += tell.changed(step, "attribute", "demote", reason)
        before = {name: survey.low[name] for name in formats}
        turn.events.append(tell.demoted(step, before, formats, reason, dry_run=self.dry_run))
        if not self.dry_run:
            turn.actions.append(Write(formats=formats, reason=reason))
            self.go_back(turn, step, survey, conclusion)
        after = self.fallback.convicted(fallback, step, before, one_more=one_more)
        hold = f"for {self.fallback.hold(after)} steps"
        final = after.phase == "permanent"
        turn.events += tell.changed(step, "demote", after.phase, "for good" if final else hold)
        turn.state = replace(turn.state, fallback=after)
        cases = OpenCases().closed(turn.state.cases)
        if any(formats.get(name) != survey.high for name in survey.low):
            # Culprits may be left over, or what grows be too large for the new formats tomorrow.
            cases = OpenCases().acquitted(cases, step, step)
        turn.state = replace(
            turn.state,
            cases=cases,
            harmless=0,
            harmless_until=0,
            skip_looks=0,
            skip_look_next=step,
        )
        if not self.dry_run:
            turn.formats_changed(self.detector, self.limits, after.demoted)
            turn.state = replace(turn.state, skips=0)
            low = [name for name, format in formats.items() if format != survey.high]
            self.check_cure(turn, step, low, evidence.case.batch)

    def go_back(self, turn: Turn, step: int, survey: Surveyed, conclusion: Conclusion) -> None:
        """Take over the trajectory in high precision, or else the snapshot before the fault."""
        start, high = conclusion.start, conclusion.high
        none_made = survey.losses is not None and survey.skipped == len(survey.losses)
        if start is None or (high is None and survey.finite and none_made):
            return  # nothing was made with what was wrong
        undone = step - start
        turn.count(
            rolled_back=undone,
            undone=undone - survey.skipped,
            made_good=0 if high is None else conclusion.made,
        )
        made_good = 0 if high is None else conclusion.made
        turn.actions.append(GoBack(start=start, instead=high))
        turn.events.append(tell.rolled_back(step, start, made_good))
        detected = self.detector.rolled_back(turn.state.detected)
        turn.state = replace(turn.state, detected=detected, calm=True)

    # -- whether it cured -----------------------------------------------------------------------

    def check_cure(
        self, turn: Turn, step: int, layers: Sequence[str], batch: int | None = None
    ) -> None:
        """Layers have other formats: ask whether these still do harm."""
        steps = turn.state.steps
        left = self.budget.left(steps=steps.attempted, replayed=steps.replayed)
        if layers and left >= CURE:
            turn.actions.append(CheckCure(at=step, layers=tuple(layers), batch=batch))

    def cure_checked(self, turn: Turn, question: CheckCure, seen: CureChecked) -> None:
        """If they do, the next rung follows at once; if not, it is asked again for a while."""
        gap = gap_of(seen, turn.state.anomaly)
        if not gap.count:  # nothing can be replayed here
            return
        cure = verify_cure(gap, seen.grad_error, self.probe.usual(turn.state.probed))
        step, layers = question.at, question.layers
        turn.events.append(
            Replayed(step=step, reason=cure.reason, numbers=cure.numbers, layers=layers)
        )
        if not cure.verified:
            turn.actions += [Climb(at=step, layer=name, reason=cure.reason) for name in layers]
            return
        if turn.state.cases.began is None:  # of a layer that has climbed: ask again tomorrow
            cases = OpenCases().acquitted(turn.state.cases, step, step)
            turn.state = replace(turn.state, cases=cases)
