"""Tells from loss and gradient norm, step by step, whether a run is diverging."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from typing import Any, Literal

from lightning_fp.stability.baseline import Baseline

Kind = Literal["ok", "skip", "suspect", "diverged"]

VERSION = 1
"""Of the state dict."""


class Cause(Enum):
    """Why a step is not simply ok; the values are the sentences that users read."""

    NONE = "nothing unusual"
    LEARNING = "the run's usual level and noise are still being learned"
    NOT_FINITE = "the loss or the gradient is not finite: leave this step out"
    OFTEN_NOT_FINITE = "the loss or the gradient is not finite, several steps in a row"
    STAYS_NOT_FINITE = "the loss or the gradient stays not finite: go back to an earlier state"
    RAISED = "the loss is persistently above its usual level"
    DRIFT = "the loss drifts upwards, by more than its noise explains"
    OUTLIERS = "most of the last losses are far above the usual level"
    GRADIENT = "most of the last gradient norms are far above the usual level"
    UPDATE = "most of the last updates are far larger than usual, for the size of the parameters"
    LASTING = "the loss rose and does not come back: go back to an earlier state"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What the detector says about one step."""

    kind: Kind
    """"ok"; "skip": this step's update should not be applied; "suspect": something is wrong and may
    yet heal, look into it; "diverged": it has not healed by itself. The last two are said at every
    step while they hold."""

    cause: Cause

    skip: bool = False
    """This step's update should not be applied, whatever else is the matter."""

    onset: int | None = None
    """Steps ago that the anomaly began, 0 for this step; None if there is none."""

    baseline: float | None = None
    """The usual loss, frozen during an anomaly; None until it is known."""

    noise: float | None = None
    """Robust standard deviation of the loss from step to step; None until it is known."""

    score: float | None = None
    """This step's loss above the baseline in units of the noise."""

    @property
    def reason(self) -> str:
        """A sentence for people, with the figures."""
        sentence = self.cause.value
        if self.onset:
            sentence += f"; since {self.onset} steps"
        if self.score is not None and self.kind != "ok":
            sentence += f"; loss at {self.score:+.1f} standard deviations from {self.baseline:.4g}"
        return sentence


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorState:
    """All that the detector remembers. Never changed: each step makes a new one."""

    loss: Baseline = field(default_factory=Baseline)
    grad_norm: Baseline = field(default_factory=Baseline)
    """Of its logarithm."""
    update_ratio: Baseline = field(default_factory=Baseline)
    """Of its logarithm."""

    lr: float | None = None
    """The smallest since the level was learned."""

    cusum: float = 0.0
    """Sum of what scores exceed the slack by, never below zero."""

    climbing: int = 0
    """Steps since that sum was zero."""

    rising: int = 0
    """Steps since the level was near its floor."""

    scores: tuple[float, ...] = ()
    """Of the last losses, oldest first."""

    grad_scores: tuple[float, ...] = ()
    update_scores: tuple[float, ...] = ()

    nonfinite: int = 0
    """Steps in a row."""

    grace: int = 0
    """Steps left in which only far outliers count and baselines are kept."""

    cause: Cause = Cause.NONE
    """Of the open incident."""

    age: int = 0
    """Steps since the incident was opened."""

    onset: int = 0
    """Steps since it began."""

    reference: float = 0.0
    """The level of the loss before it."""

    verdict: bool = False
    """It is a divergence."""


@dataclass(frozen=True, kw_only=True)
class DivergenceDetector:
    """A pure state machine: a suspicion at once, a verdict when it does not heal.
    """

    slack: float = 0.75
    threshold: float = 9.0
    drift: float = 1.0
    outlier: float = 6.0
    armed: int = 64
    lasting: int = 56
    height: float = 1.25
    healed: float = 0.75
    undecided: int = 256
    nonfinite: int = 3
    lr_rise: float = 1.5
    grace: int = 16
    least_noise: float = 0.005
    least_log_noise: float = 0.05

    def init(self) -> DetectorState:
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
        if lr is not None and math.isfinite(lr):
            state = self._lr(state, lr)
        broken = skipped or not all(
            x is None or math.isfinite(x) for x in (loss, grad_norm, update_ratio)
        )
        new: dict[str, Any] = {"nonfinite": state.nonfinite + 1 if broken else 0}
        open_ = state.cause is not Cause.NONE
        # --- the loss
        ready = state.loss.seen >= self.armed
        score = noise = level = None
        if state.loss.seen >= 16:
            noise = state.loss.noise(self.least_noise)
            level = state.reference if open_ else state.loss.level(noise)
        if loss is not None and math.isfinite(loss):
            if level is not None:
                score = (loss - level) / noise
            if not open_ and not state.grace:
                new["loss"] = state.loss.learn(loss, self.least_noise)
        if score is not None:
            new["scores"] = (*state.scores[-15:], min(max(score, -8.0), 15.0))
        elif broken and level is not None:
            new["scores"] = (*state.scores[-15:], 15.0) if open_ else state.scores
        for name, value in (("grad_norm", grad_norm), ("update_ratio", update_ratio)):
            if value is None or not math.isfinite(value) or value <= 0:
                continue
            base = getattr(state, name)
            x = math.log(value)
            if base.seen >= self.armed:
                n = base.noise(self.least_log_noise)
                z = (x - base.level(n)) / n
                key = "grad_scores" if name == "grad_norm" else "update_scores"
                new[key] = (*getattr(state, key)[-4:], min(z, 15.0))
            if not open_ and not state.grace:
                new[name] = base.learn(x, self.least_log_noise)
        new["grace"] = max(0, state.grace - 1)

        if open_:
            new["age"] = state.age + 1
            new["onset"] = state.onset + 1
            nxt = replace(state, **new)
            nxt = self._judge(nxt)
        else:
            if ready and not state.grace and score is not None:
                cusum = max(0.0, state.cusum + min(max(score, -4.0), 4.0) - self.slack)
                new["cusum"] = cusum
                new["climbing"] = state.climbing + 1 if cusum else 0
                base = state.loss
                rise = base.averages[1] - base.floor
                near = rise < 0.25 * self.drift * noise * math.sqrt(base.sums)
                new["rising"] = 0 if near else state.rising + 1
            nxt = replace(state, **new)
            nxt = self._suspect(nxt, state, noise, level, ready)
        kind: Kind
        cause = nxt.cause
        if nxt.cause is not Cause.NONE:
            kind = "diverged" if nxt.verdict else "suspect"
            if nxt.verdict and cause is not Cause.STAYS_NOT_FINITE:
                cause = Cause.LASTING
        elif broken:
            kind, cause = "skip", Cause.NOT_FINITE
        else:
            kind = "ok"
            if not ready:
                cause = Cause.LEARNING
        return nxt, Decision(
            kind=kind,
            cause=cause,
            skip=broken,
            onset=None if nxt.cause is Cause.NONE else nxt.onset,
            baseline=level,
            noise=noise,
            score=score,
        )

    def _lr(self, state, lr):
        if state.lr is None or lr < state.lr:
            return replace(state, lr=lr)
        if lr > self.lr_rise * state.lr:
            if state.cause is not Cause.NONE or state.loss.seen < 16:
                return replace(state, lr=lr)
            return replace(self._relearn(state), lr=lr)
        return state

    def _relearn(self, state):
        return replace(
            state,
            loss=state.loss.forget_level(),
            cusum=0.0, climbing=0, rising=0, scores=(), grad_scores=(), update_scores=(),
            grad_norm=state.grad_norm.forget_level(),
            update_ratio=state.update_ratio.forget_level(),
            cause=Cause.NONE, age=0, onset=0, verdict=False,
        )

    def _suspect(self, s, old, noise, level, ready):
        cause, onset = Cause.NONE, 0
        base = old.loss
        last = s.scores[-5:]
        if s.nonfinite > self.nonfinite and (ready or s.nonfinite >= 40):
            cause, onset = Cause.OFTEN_NOT_FINITE, s.nonfinite - 1
            level = level if level is not None else math.nan
        elif level is None:
            pass
        else:
            gross = self.outlier if ready else 2 * self.outlier
            known = ready or base.known > self.armed
            if known and sum(z > gross for z in last) >= 3:
                cause = Cause.OUTLIERS
                onset = max(i for i, z in enumerate(reversed(last)) if z > gross)
            elif ready and s.cusum > self.threshold * base.sums:
                cause, onset = Cause.RAISED, s.climbing - 1
            elif ready and (base.averages[1] - base.floor) > self.drift * noise * math.sqrt(base.sums):
                cause, onset = Cause.DRIFT, s.rising
                level = min(level, base.floor)
            elif sum(z > 8 for z in s.grad_scores) >= 4:
                cause, onset = Cause.GRADIENT, 4
            elif sum(z > 8 for z in s.update_scores) >= 4:
                cause, onset = Cause.UPDATE, 4
        if cause is Cause.NONE:
            return s
        return replace(s, cause=cause, onset=onset, age=0, reference=level, loss=old.loss,
            scores=s.scores[-16:], verdict=False)

    def _judge(self, s):
        if s.nonfinite:
            if s.nonfinite >= self.lasting:
                return replace(s, verdict=True, cause=Cause.STAYS_NOT_FINITE)
            return s
        recent = s.scores
        mean = sum(recent) / len(recent) if recent else 0.0
        if math.isnan(s.reference):
            return self._relearn(s)
        if s.age >= 8 and len(recent) and mean < self.healed:
            return self._close(s)
        if s.age >= self.lasting and mean > self.height:
            return replace(s, verdict=True)
        if s.age >= self.undecided and not s.verdict:
            return self._relearn(s)
        return s

    def _close(self, s):
        new = dict(cause=Cause.NONE, age=0, onset=0, verdict=False, cusum=0.0, climbing=0, rising=0,
            scores=())
        if s.cause is Cause.GRADIENT:
            new.update(grad_norm=s.grad_norm.forget_level(), grad_scores=())
        if s.cause is Cause.UPDATE:
            new.update(update_ratio=s.update_ratio.forget_level(), update_scores=())
        return replace(s, **new)
