"""All that the watch remembers, and its form in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_fp.argument_types import built
from lightning_fp.stability.accounting import Accounting
from lightning_fp.stability.detect.cast_trigger import CastState, CastTrigger
from lightning_fp.stability.detect.detector import DivergenceDetector
from lightning_fp.stability.detect.detector_state import DetectorState
from lightning_fp.stability.detect.overflow_watch import OverflowState
from lightning_fp.stability.judge.inquiry import Inquiry
from lightning_fp.stability.respond.fallback_policy import Fallback, FallbackState
from lightning_fp.stability.respond.limits import LimitState
from lightning_fp.stability.respond.open_cases import CasesState
from lightning_fp.stability.respond.probe import Probe, ProbeState
from lightning_fp.stability.respond.verdict import Anomaly
from lightning_fp.state_version import check_version

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class WatchState:
    """Where the watch stands: never changed, each signal makes a new one."""

    fallback: FallbackState = field(default_factory=FallbackState)
    detected: DetectorState = field(default_factory=DetectorState)
    probed: ProbeState = field(default_factory=ProbeState)
    limits: LimitState = field(default_factory=lambda: LimitState(over={}, resting={}))
    overflows: OverflowState = field(default_factory=OverflowState)
    steps: Accounting = field(default_factory=Accounting)
    skips: int = 0
    """Steps left out in a row."""

    calm: bool = True
    """Whether nothing is unusual: a state that is worth keeping."""

    anomaly: Anomaly = field(default_factory=Anomaly)
    """Level and noise of the loss, as of the last step."""

    first_losses: tuple[float, ...] = ()
    """Those of the run's first steps: what it has learned is told from them."""

    misbehaving: bool = False
    """Whether it was said that high precision misbehaves too."""

    casts: CastState | None = None
    """The largest values that were cast in the last steps; None before the first."""

    cases: CasesState = field(default_factory=CasesState)
    """What was acquitted because it has done no harm so far."""

    harmless: int = 0
    """Such acquittals in a row."""

    harmless_until: int = 0
    """Step up to which a probe's suspicion asks for no trajectory."""

    skip_looks: int = 0
    """Single steps that were left out, and whose batches did not blame precision, in a row."""

    skip_look_next: int = 0
    """Step from which on the next one is looked into."""

    inquiry: Inquiry | None = None
    """The case being asked; never in a checkpoint, since it is closed before the next step."""


def to_plain(state: WatchState, detector: DivergenceDetector) -> dict[str, Any]:
    """As numbers, strings, lists and dicts."""
    return {
        "version": VERSION,
        "fallback": Fallback().state_dict(state.fallback),
        "detector": detector.state_dict(state.detected),
        "probe": Probe().state_dict(state.probed),
        "limits": {
            "over": dict(state.limits.over),
            "resting": dict(state.limits.resting),
            "climbs": state.limits.climbs,
        },
        "overflows": asdict(state.overflows),
        "steps": asdict(state.steps),
        "skips": state.skips,
        "calm": state.calm,
        "misbehaving": state.misbehaving,
        "anomaly": asdict(state.anomaly),
        "first_losses": list(state.first_losses),
        "casts": None if state.casts is None else CastTrigger().state_dict(state.casts),
        "cases": asdict(state.cases),
        "harmless": [state.harmless, state.harmless_until],
        "skip_looks": [state.skip_looks, state.skip_look_next],
    }


def from_plain(plain: Mapping[str, Any], detector: DivergenceDetector) -> WatchState:
    """The state that `to_plain` was given.

    Raises:
        ValueError: if it is of another version.
    """
    saved = check_version(plain, VERSION, "the watch's state")
    casts: dict[str, Any] | None = saved.get("casts")
    harmless, harmless_until = saved.get("harmless", (0, 0))
    skip_looks, skip_look_next = saved.get("skip_looks", (0, 0))
    overflows = built(OverflowState, saved.get("overflows", {}))
    limits: Mapping[str, Any] = saved.get("limits") or {"over": {}, "resting": {}, "climbs": 0}
    return WatchState(
        fallback=Fallback().load_state_dict(saved["fallback"]),
        detected=detector.load_state_dict(saved["detector"]),
        probed=Probe().load_state_dict(saved["probe"]),
        limits=LimitState(
            over=dict(limits["over"]), resting=dict(limits["resting"]), climbs=limits["climbs"]
        ),
        overflows=replace(overflows, recent=tuple(overflows.recent)),
        steps=built(Accounting, saved["steps"]),
        skips=saved["skips"],
        calm=saved["calm"],
        misbehaving=saved.get("misbehaving", False),
        anomaly=built(Anomaly, saved["anomaly"]),
        first_losses=tuple(saved.get("first_losses", ())),
        casts=None if casts is None else CastTrigger().load_state_dict(casts),
        cases=built(CasesState, saved.get("cases", {})),
        harmless=harmless,
        harmless_until=harmless_until,
        skip_looks=skip_looks,
        skip_look_next=skip_look_next,
    )
