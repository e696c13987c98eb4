"""What is done when training and rollout drift apart: say so, and raise the precision.

A rise is told once, not at every step that it lasts. Where precision is raised, nothing follows for
a while: to raise one side alone does not help, and the rollout engine gets the new formats with its
next weights at the earliest. Nothing goes back down by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning_fp.layers import LinearFormat
from lightning_fp.layers.table_owner import TableOwner
from lightning_fp.records.event_log import EventLog
from lightning_fp.records.events import Suspicion
from lightning_fp.stability.detect.mismatch_detector import MismatchDecision, MismatchDetector
from lightning_fp.telemetry.mismatch.mismatch_remedy import raised_formats, write_formats

Act = Literal["log", "raise-precision"]


class EarlyWarning:
    """Judges each measurement; alike on all ranks, for the measurements are.

    Args:
        detector: what growth is worth a warning.
        act: what to do besides judging; None: nothing.
        raise_to: the format to raise all layers to; None: the next on the way up.
        hold_steps: optimizer steps after a change without another one, or a warning.
    """

    def __init__(
        self,
        detector: MismatchDetector,
        act: Act | None,
        raise_to: LinearFormat | None,
        hold_steps: int,
    ) -> None:
        self.detector, self.act = detector, act
        self.raise_to, self.hold_steps = raise_to, hold_steps
        self.detected = detector.init()
        """What the detector has seen."""
        self._quiet_until = 0
        self._told = False

    def judge(
        self, owner: TableOwner | None, log: EventLog, step: int, values: Mapping[str, float]
    ) -> None:
        """Take in what one step has shown.

        Args:
            owner: of the table to write to; None where there is none.
            log: where a warning goes.
            step: optimizer steps done.
            values: the metrics of `TrainingInferenceMismatch`.
        """
        if self.act is None:
            return
        self.detected, decision = self.detector.step(
            self.detected, abs_diff=values["logprob_abs_diff_mean"], k3=values["k3_kl"]
        )
        if not decision.raised:
            self._told = False
        elif step >= self._quiet_until:  # else what was done shall have time to work
            action = self._raise(owner, step, decision) if self.act == "raise-precision" else ""
            if action or not self._told:
                _warn(log, step, decision, values, action)
            self._told = True

    def _raise(self, owner: TableOwner | None, step: int, decision: MismatchDecision) -> str:
        """What was done, in words; nothing if there is nothing left to do."""
        if owner is None:
            return ""
        formats = raised_formats(owner, self.raise_to)
        if not formats:
            # A hint and no action: it comes with the first warning of a rise only.
            if self._told:
                return ""
            fp16_next = self.raise_to is None and owner.scaler is None
            return "no layer is left in FP8; for fp16 take FP16Precision" if fp16_next else ""
        changes = write_formats(owner.precision_map, formats, decision.reason)
        self._quiet_until = step + self.hold_steps
        self.detected = self.detector.precision_changed(self.detected)
        ways = sorted({f"{before} -> {after}" for before, after in changes.values()})
        layers = f"{len(changes)} layer{'s' if len(changes) != 1 else ''}"
        return f"{layers} {', '.join(ways)}; the rollout engine has to follow"

    def state_dict(self) -> dict[str, Any]:
        """The detector's state, and when precision was raised."""
        return {
            "detector": self.detector.state_dict(self.detected),
            "quiet_until": self._quiet_until,
            "told": self._told,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        self.detected = self.detector.load_state_dict(state["detector"])
        self._quiet_until, self._told = int(state["quiet_until"]), bool(state["told"])


def _warn(
    log: EventLog,
    step: int,
    decision: MismatchDecision,
    values: Mapping[str, float],
    action: str,
) -> None:
    optional = {"usual": decision.usual, "onset": decision.onset, "factor": decision.factor}
    numbers = {
        "mismatch/k3_kl": values["k3_kl"],
        "mismatch/logprob_abs_diff_mean": values["logprob_abs_diff_mean"],
        "mismatch/extreme_disagreement": values["extreme_disagreement"],
        **{name: float(value) for name, value in optional.items() if value is not None},
    }
    log.write(Suspicion(step=step, reason=decision.reason, numbers=numbers, action=action))
    log.count("mismatch_warnings", step)
