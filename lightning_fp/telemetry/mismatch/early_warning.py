"""What is done when training and rollout drift apart: say so, and then what the cause calls for.

A rise is told once, not at every step that it lasts, and before anything is done. Precision is
raised where nothing says that it is not the cause; where stale weights or routing are, importance
weights are bounded more tightly. Then nothing follows for a while: to raise one side alone does not
help, and the rollout engine gets the new formats with its next weights at the earliest. Nothing
goes back down by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_fp.layers import LinearFormat
from lightning_fp.layers.table_owner import TableOwner
from lightning_fp.records.event_log import EventLog
from lightning_fp.records.events import Suspicion
from lightning_fp.rl.causes import Causes
from lightning_fp.rl.corrections import Correction
from lightning_fp.stability.detect.mismatch_detector import MismatchDecision, MismatchDetector
from lightning_fp.telemetry.mismatch.mismatch_remedy import raised_formats, write_formats

Act = Literal["log", "raise-precision", "by-cause"]

TIGHTEST = 1.05
"""Bounds nearer to 1 are tightened no more: that is what bf16 does to single tokens."""


class EarlyWarning:
    """Judges each measurement; alike on all ranks, for the measurements are.

    Args:
        detector: what growth is worth a warning.
        act: what to do besides judging; None: nothing.
        raise_to: the format to raise all layers to; None: the next on the way up.
        hold_steps: optimizer steps after a change without another one, or a warning.
        correction: the bounds on importance weights to begin with; None: there are none.
    """

    def __init__(
        self,
        detector: MismatchDetector,
        act: Act | None,
        raise_to: LinearFormat | None,
        hold_steps: int,
        correction: Correction | None = None,
    ) -> None:
        self.detector, self.act = detector, act
        self.correction = correction
        """The bounds on importance weights that are in force."""
        self.raise_to, self.hold_steps = raise_to, hold_steps
        self.detected = detector.init()
        """What the detector has seen."""
        self._quiet_until = 0
        self._told = False

    def judge(
        self,
        owner: TableOwner | None,
        log: EventLog,
        step: int,
        values: Mapping[str, float],
        causes: Causes | None = None,
    ) -> None:
        """Take in what one step has shown.

        Args:
            owner: of the table to write to; None where there is none.
            log: where a warning goes.
            step: optimizer steps done.
            values: the metrics of `TrainingInferenceMismatch`.
            causes: what they come from; None where nothing was given to tell by.
        """
        if self.act is None:
            return
        self.detected, decision = self.detector.step(
            self.detected, abs_diff=values["logprob_abs_diff_mean"], k3=values["k3_kl"]
        )
        if not decision.raised:
            self._told = False
        elif step >= self._quiet_until:  # else what was done shall have time to work
            plan = self._plan(owner, decision, causes)
            if plan.carry_out is not None or not self._told:
                _warn(log, step, decision, values, causes, plan.words)
            if plan.carry_out is not None:
                plan.carry_out()
                self._quiet_until = step + self.hold_steps
                self.detected = self.detector.precision_changed(self.detected)
            self._told = True

    def _plan(
        self, owner: TableOwner | None, decision: MismatchDecision, causes: Causes | None
    ) -> _Plan:
        main = None if causes is None else causes.main
        if self.act == "log":
            return _Plan()
        if main in ("staleness", "routing"):
            return self._tighten() if self.act == "by-cause" else _Plan()
        return self._raise(owner, decision) if main in (None, "precision") else _Plan()

    def _tighten(self) -> _Plan:
        before = self.correction
        if before is None:
            return _Plan("no correction to tighten; give one with correction=")
        after = before.tightened()
        ends = [bound for bound in (after.low, 1 / after.high) if bound > 0]
        if not ends or max(ends) > 1 / TIGHTEST:
            return _Plan()

        def tighten() -> None:
            self.correction = after

        return _Plan(f"{before.words} -> [{after.low:.3g}, {after.high:.3g}]", tighten)

    def _raise(self, owner: TableOwner | None, decision: MismatchDecision) -> _Plan:
        if owner is None:
            return _Plan()
        formats = raised_formats(owner, self.raise_to)
        if not formats:
            if self.raise_to is not None or owner.scaler is not None:
                return _Plan()
            return _Plan("no layer is left in FP8; for fp16 take FP16Precision")
        table = owner.precision_map
        before = {name: table.layers[name].format.name for name in formats}
        ways = sorted({f"{before[name]} -> {to.name}" for name, to in formats.items()})
        layers = f"{len(formats)} layer{'s' if len(formats) != 1 else ''}"
        words = f"{layers} {', '.join(ways)}; the rollout engine has to follow"
        return _Plan(words, lambda: write_formats(table, formats, decision.reason))

    def state_dict(self) -> dict[str, Any]:
        """The detector's state, when something was done, and the bounds in force."""
        bounds = self.correction
        return {
            "detector": self.detector.state_dict(self.detected),
            "quiet_until": self._quiet_until,
            "told": self._told,
            "bounds": None if bounds is None else [bounds.low, bounds.high],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        self.detected = self.detector.load_state_dict(state["detector"])
        self._quiet_until, self._told = int(state["quiet_until"]), bool(state["told"])
        bounds = state.get("bounds")
        if bounds is not None and self.correction is not None:
            self.correction = replace(self.correction, low=bounds[0], high=bounds[1])


@dataclass(frozen=True)
class _Plan:
    words: str = ""
    """What is going to be done, or could be; "" for nothing."""

    carry_out: Callable[[], object] | None = None
    """Does it."""


def _warn(
    log: EventLog,
    step: int,
    decision: MismatchDecision,
    values: Mapping[str, float],
    causes: Causes | None,
    action: str,
) -> None:
    optional = {"usual": decision.usual, "onset": decision.onset, "factor": decision.factor}
    numbers = {
        "mismatch/k3_kl": values["k3_kl"],
        "mismatch/logprob_abs_diff_mean": values["logprob_abs_diff_mean"],
        "mismatch/extreme_disagreement": values["extreme_disagreement"],
        **{name: float(value) for name, value in optional.items() if value is not None},
    }
    reason = decision.reason
    if causes is not None:
        numbers |= {f"mismatch/{name}": value for name, value in causes.numbers().items()}
        reason += f"; {causes.sentence}"
    log.write(Suspicion(step=step, reason=reason, numbers=numbers, action=action))
    log.count("mismatch_warnings", step)
