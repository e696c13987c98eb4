"""Tells from loss and gradient norm, step by step, whether a run is diverging.

A loss is judged against what is usual for this run (`signal_level`), in units of the run's own
noise, so that no threshold depends on its scale. A suspicion comes early, because what answers it,
a replay, is cheap and settles the matter. A verdict comes late, because a rise that heals by itself
is none. From the suspicion on nothing is learned any more: an anomaly must not become the usual.
Why a loss rises is not asked here. docs/detector.md has the rules with what they find, measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_fp.argument_types import checked
from lightning_fp.stability.detect.decision import Cause, Decision
from lightning_fp.stability.detect.detector_state import DetectorState, from_plain, to_plain
from lightning_fp.stability.detect.incident import (
    CUSUM_CLIP,
    FARTHEST,
    NEAR,
    VOTES,
    WINDOW,
    AnomalyScores,
    Incident,
    first_vote,
    votes,
    with_score,
)
from lightning_fp.stability.detect.signal_level import START, SignalLevel

_UNSETTLED = 2.0
"""While the level is learned again, outliers must be so many times farther off."""

_GRADIENT_OUTLIER = 8.0
"""Of the logarithm of gradient norm and update ratio: healthy runs have large ones now and then."""


@checked
@dataclass(frozen=True, kw_only=True)
class DivergenceDetector:
    """A pure state machine: suspicion within steps, a verdict only on what does not heal.

    >>> detector = DivergenceDetector()
    >>> state, before = detector.init(), "ok"
    >>> for step in range(300):
    ...     loss = 3.0 + 0.05 * (-1) ** step + (0.4 if step >= 200 else 0.0)
    ...     state, decision = detector.step(state, loss=loss)
    ...     if decision.kind != before:
    ...         print(step, decision.kind, decision.cause.name, "since", decision.onset)
    ...         before = decision.kind
    202 suspect RAISED since 2
    258 diverged LASTING since 58

    Defaults were chosen on one recorded run and on synthetic ones; see docs/detector.md.
    """

    cusum: float = 9.0
    """Suspicion when the sum of what scores (losses above the usual one, in standard deviations of
    the noise) exceed `slack` by is above this. Multiplied with `SignalLevel.patience`."""

    slack: float = 0.75
    """Standard deviations that add nothing to the sum; half of the smallest lasting step that is to
    be found fast (Page 1954)."""

    drift: float = 1.0
    """Suspicion when the average loss is so many standard deviations above the lowest one."""

    outlier: float = 6.0
    """Suspicion when 3 of the last 5 losses are more than so many standard deviations above the
    usual one."""

    nonfinite: int = 3
    """Suspicion when more than so many steps in a row are not finite."""

    armed: int = 64
    """Losses to learn from before anything but the non-finite counts."""

    heals: int = 40
    """An anomaly that is over within so many steps is never a divergence."""

    lasting: float = 1.0
    """Divergence when the loss is still so many standard deviations above what it was, as the mean
    of 16 steps, all of them later than `heals`."""

    healed: float = 0.6
    """An anomaly is over when that mean is below this."""

    undecided: int = 256
    """Steps after which an anomaly that is neither over nor lasting is taken for the new level."""

    lr_rise: float = 1.5
    """The level is learned again when the learning rate has risen by this factor, at once or
    slowly: a higher loss is what one expects then."""

    grace: int = 16
    """Steps after a rollback or a change of precision in which baselines are kept as they were and
    only outliers and the non-finite count."""

    least_noise: float = 0.005
    """The noise of the loss is taken for at least this."""

    least_log_noise: float = 0.05
    """The same of the logarithms of gradient norm and update ratio."""

    def __post_init__(self) -> None:
        for name in ("cusum", "drift", "outlier", "lasting", "least_noise", "least_log_noise"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        for name, least in (
            ("slack", 0),
            ("nonfinite", 0),
            ("armed", START),
            ("heals", 0),
            ("grace", 0),
        ):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.healed < self.lasting:
            raise ValueError(f"healed must be below lasting, {self.lasting}, got {self.healed}")
        if not self.undecided > self.heals + WINDOW:
            raise ValueError(
                f"undecided must be above heals + {WINDOW}, {self.heals + WINDOW}, got"
                f" {self.undecided}"
            )
        if not self.lr_rise > 1:
            raise ValueError(f"lr_rise must be greater than 1, got {self.lr_rise}")

    def init(self) -> DetectorState:
        """The state before the first step."""
        return DetectorState()

    def step(
        self,
        state: DetectorState,
        *,
        loss: float | None = None,
        grad_norm: float | None = None,
        lr: float | None = None,
        update_ratio: float | None = None,
        skipped: bool = False,
    ) -> tuple[DetectorState, Decision]:
        """Judge one step.

        Args:
            state: of the step before; it stays as it is.
            loss: mean of the step's batch over all ranks; not finite if it was not.
            grad_norm: of all parameters, before clipping.
            lr: the learning rate in force; a rise of it explains a rise of the loss.
            update_ratio: RMS of the step's update over RMS of the parameters.
            skipped: a guard or a loss scaler has left this step out.

        Returns:
            The state for the next step, and the decision.
        """
        broken = (
            skipped
            or (loss is not None and not math.isfinite(loss))
            or (grad_norm is not None and not math.isfinite(grad_norm))
            or (update_ratio is not None and not math.isfinite(update_ratio))
        )
        nonfinite = state.nonfinite + 1 if broken else 0
        state, lowest_lr = self._learning_rate(state, lr)
        noise, level = self._usual(state)
        incident = state.incident
        if incident is None:
            finite = loss if loss is not None and math.isfinite(loss) else None
            score = None
            if finite is not None and noise is not None and level is not None:
                score = (finite - level) / noise
            evidence, grad_after, update_after = self._weigh(
                state, score, noise, grad_norm, update_ratio
            )
            incident = self._suspect(state, evidence, noise, nonfinite)
            # In the grace too, baselines stay as they were before: what was done may not have
            # cured the run, and must not teach it that its fault is the usual.
            keep = state.grace > 0 or incident is not None
            usual = state.loss
            if finite is not None and not keep:
                usual = usual.learn(finite, self.least_noise)
            state = DetectorState(
                loss=usual,
                grad_norm=state.grad_norm if keep else grad_after,
                update_ratio=state.update_ratio if keep else update_after,
                lr=lowest_lr,
                nonfinite=nonfinite,
                grace=max(0, state.grace - 1),
                evidence=evidence if incident is None else AnomalyScores(),
                incident=incident,
            )
        else:
            level = incident.level
            state = replace(state, lr=lowest_lr, nonfinite=nonfinite)
            state = self._judge(state, incident, loss, noise, broken)
        return state, self._decide(state, loss, level, noise, broken)

    def rolled_back(self, state: DetectorState) -> DetectorState:
        """After the run went back to a state before the anomaly.

        What was usual before it stays in force, and is not learned from during the grace.
        """
        return replace(
            state, evidence=AnomalyScores(), incident=None, nonfinite=0, grace=self.grace
        )

    def precision_changed(self, state: DetectorState) -> DetectorState:
        """After formats have changed: as `rolled_back`, so that a rise due to them is seen."""
        return self.rolled_back(state)

    def cleared(self, state: DetectorState) -> DetectorState:
        """After someone looked and found nothing to be done: what is now is the usual level."""
        return replace(self._learn_again(state), nonfinite=0)

    def state_dict(self, state: DetectorState) -> dict[str, Any]:
        """As plain numbers, strings, lists and dicts, for a checkpoint."""
        return to_plain(state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> DetectorState:
        """The state that `state_dict` was made of; continues bit for bit.

        Raises:
            ValueError: if it is of another version, or no detector's.
        """
        return from_plain(state_dict)

    def _learning_rate(
        self, state: DetectorState, lr: float | None
    ) -> tuple[DetectorState, float | None]:
        """The state, its level forgotten if the learning rate has risen, and the lowest rate."""
        if lr is None or not math.isfinite(lr):
            return state, state.lr
        if state.lr is None or lr < state.lr:
            return state, lr
        # Against the lowest rate, not the one before: a warm-up rises by little at each step.
        if lr <= self.lr_rise * state.lr:
            return state, state.lr
        if state.incident is None and state.loss.seen >= START:
            state = self._learn_again(state)
        return state, lr

    def _learn_again(self, state: DetectorState) -> DetectorState:
        return replace(
            state,
            loss=state.loss.forget_level(),
            grad_norm=state.grad_norm.forget_level(),
            update_ratio=state.update_ratio.forget_level(),
            evidence=AnomalyScores(),
            incident=None,
            grace=0,
        )

    def _usual(self, state: DetectorState) -> tuple[float | None, float | None]:
        """Noise and level of the loss, None until they are known."""
        if state.loss.seen < START:
            return None, None
        return state.loss.noise(self.least_noise), state.loss.level

    def _weigh(
        self,
        state: DetectorState,
        score: float | None,
        noise: float | None,
        grad_norm: float | None,
        update_ratio: float | None,
    ) -> tuple[AnomalyScores, SignalLevel, SignalLevel]:
        """The evidence with this step's, and the baselines of the logarithms if they may learn."""
        before = state.evidence
        scores, cusum = before.scores, before.cusum
        climbing, drifting = before.climbing, before.drifting
        if score is not None and noise is not None:
            # Outliers are heard in the grace and before the level is known well, being far off it;
            # sums would take an error of the level itself for a rise.
            scores = with_score(scores, score, VOTES)
            if not state.grace and state.loss.seen >= self.armed:
                excess = min(max(score, -CUSUM_CLIP), CUSUM_CLIP) - self.slack
                cusum = max(0.0, cusum + excess)
                # A CUSUM dates a change to where it last was zero (Page 1954).
                climbing = climbing + 1 if cusum else 0
                near = state.loss.drift(noise) < NEAR * self.drift
                drifting = 0 if near else drifting + 1
        grad_after, grad_scores = self._logarithm(state.grad_norm, grad_norm, before.grad_scores)
        update_after, update_scores = self._logarithm(
            state.update_ratio, update_ratio, before.update_scores
        )
        evidence = AnomalyScores(
            cusum=cusum,
            climbing=climbing,
            drifting=drifting,
            scores=scores,
            grad_scores=grad_scores,
            update_scores=update_scores,
        )
        return evidence, grad_after, update_after

    def _logarithm(
        self, baseline: SignalLevel, value: float | None, scores: tuple[float, ...]
    ) -> tuple[SignalLevel, tuple[float, ...]]:
        """Level and scores of a positive signal, with one more value of it.

        Gradient norms and updates scatter by factors, not by amounts: so their logarithms count.
        """
        if value is None or not math.isfinite(value) or value <= 0:
            return baseline, scores
        logarithm = math.log(value)
        if baseline.seen >= self.armed:
            score = (logarithm - baseline.level) / baseline.noise(self.least_log_noise)
            scores = with_score(scores, score, VOTES)
        return baseline.learn(logarithm, self.least_log_noise), scores

    def _suspect(
        self, state: DetectorState, evidence: AnomalyScores, noise: float | None, nonfinite: int
    ) -> Incident | None:
        """An incident if there is reason for one."""
        usual, level = state.loss, state.loss.level
        if noise is None:
            if nonfinite <= self.heals:  # a loss scaler may be looking for its scale
                return None
            return Incident(cause=Cause.OFTEN_NOT_FINITE, onset=nonfinite - 1, level=None)
        # `seen` begins again where the level is learned again, `known` does not: noise is known
        # then, and what is far off is an outlier at any level.
        armed = usual.seen >= self.armed
        outlier = self.outlier if armed else _UNSETTLED * self.outlier
        cause, onset = None, 0
        if nonfinite > (self.nonfinite if armed else self.heals):
            cause, onset = Cause.OFTEN_NOT_FINITE, nonfinite - 1
        elif usual.known >= self.armed and 2 * votes(evidence.scores, outlier) > VOTES:
            cause, onset = Cause.OUTLIERS, first_vote(evidence.scores, outlier)
        # False alarms of a sum go with exp(-2 slack limit / variance) (Siegmund 1985, Sequential
        # Analysis), so its limit grows with the variance. That of a mean, in `_judge`, with the
        # root of it.
        elif evidence.cusum > self.cusum * usual.patience:
            cause, onset = Cause.RAISED, evidence.climbing - 1
        elif armed and not state.grace and usual.drift(noise) > self.drift:
            cause, onset = Cause.DRIFT, evidence.drifting
            level = min(level, usual.floor)  # the level itself has given way to the drift
        # Four of five: two or three large norms in a row also come in healthy runs.
        elif votes(evidence.grad_scores, _GRADIENT_OUTLIER) > VOTES - 2:
            cause, onset = Cause.GRADIENT, first_vote(evidence.grad_scores, _GRADIENT_OUTLIER)
        elif votes(evidence.update_scores, _GRADIENT_OUTLIER) > VOTES - 2:
            cause, onset = Cause.UPDATE, first_vote(evidence.update_scores, _GRADIENT_OUTLIER)
        if cause is None:
            return None
        return Incident(cause=cause, onset=onset, level=level, descent=usual.descent)

    def _judge(
        self,
        state: DetectorState,
        incident: Incident,
        loss: float | None,
        noise: float | None,
        broken: bool,
    ) -> DetectorState:
        """What has become of an incident."""
        level = None if incident.level is None else incident.level - incident.descent
        score = 0.0
        if broken:
            score = FARTHEST
        elif loss is not None and level is not None and noise is not None:
            score = (loss - level) / noise
        incident = replace(
            incident,
            age=incident.age + 1,
            onset=incident.onset + 1,
            level=level,
            scores=with_score(incident.scores, score, WINDOW),
        )
        mean = sum(incident.scores) / len(incident.scores)
        lasting = self.lasting * math.sqrt(state.loss.patience)
        if state.nonfinite > self.heals:
            incident = replace(incident, cause=Cause.STAYS_NOT_FINITE, diverged=True)
        elif len(incident.scores) >= WINDOW // 2 and mean < self.healed:
            return self._over(state, incident)
        # By now all scores of the mean are later than `heals`.
        elif incident.age >= self.heals + WINDOW and mean > lasting and not state.nonfinite:
            incident = replace(incident, cause=Cause.LASTING, diverged=True)
        elif incident.age >= self.undecided and not incident.diverged:
            return self._learn_again(state)
        return replace(state, incident=incident)

    def _over(self, state: DetectorState, incident: Incident) -> DetectorState:
        state = replace(state, incident=None, evidence=AnomalyScores())
        # The loss is where it was, so the other signal has found a new level, and not a fault.
        if incident.cause is Cause.GRADIENT:
            return replace(state, grad_norm=state.grad_norm.forget_level())
        if incident.cause is Cause.UPDATE:
            return replace(state, update_ratio=state.update_ratio.forget_level())
        if incident.cause is Cause.DRIFT:  # up, but less than it seemed: learn how much
            return replace(state, loss=state.loss.forget_level())
        return state

    def _decide(
        self,
        state: DetectorState,
        loss: float | None,
        level: float | None,
        noise: float | None,
        broken: bool,
    ) -> Decision:
        incident = state.incident
        onset = None
        if incident is not None:
            kind = "diverged" if incident.diverged else "suspect"
            cause, onset, level = incident.cause, incident.onset, incident.level
        elif broken:
            kind, cause = "skip", Cause.NOT_FINITE
        else:
            kind = "ok"
            cause = Cause.HEALTHY if state.loss.seen >= self.armed else Cause.LEARNING
        return Decision(
            kind=kind,
            cause=cause,
            skip=broken,
            onset=onset,
            loss=loss,
            baseline=level,
            noise=noise,
        )
