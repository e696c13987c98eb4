"""All that the divergence detector remembers, and its form in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from lightning_fp.argument_types import built
from lightning_fp.stability.detect.decision import Cause
from lightning_fp.stability.detect.incident import AnomalyScores, Incident
from lightning_fp.stability.detect.signal_level import SignalLevel
from lightning_fp.state_version import check_version

VERSION = 1
"""Of the plain form."""

Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorState:
    """All that the detector remembers: never changed, each step makes a new one."""

    loss: SignalLevel = field(default_factory=SignalLevel)

    grad_norm: SignalLevel = field(default_factory=SignalLevel)
    """Of its logarithm."""

    update_ratio: SignalLevel = field(default_factory=SignalLevel)
    """Of its logarithm."""

    lr: float | None = None
    """The lowest learning rate since the level was learned."""

    nonfinite: int = 0
    """Steps in a row."""

    grace: int = 0
    """Steps left in which baselines are kept and only far outliers count."""

    evidence: AnomalyScores = field(default_factory=AnomalyScores)

    incident: Incident | None = None


def to_plain(state: DetectorState) -> dict[str, Any]:
    """As numbers, strings, lists and dicts."""
    return {"version": VERSION, **_plain(asdict(state))}


def from_plain(plain: Mapping[str, Any]) -> DetectorState:
    """The state that `to_plain` was given, to the bit.

    Raises:
        ValueError: if it is of another version, or no detector's.
    """
    do = "it is of another release: start with detector.init()"
    parts = check_version(plain, VERSION, "the detector's state", do=do)
    for name in ("loss", "grad_norm", "update_ratio"):
        parts[name] = _record(SignalLevel, parts.get(name))
    parts["evidence"] = _record(AnomalyScores, parts.get("evidence"))
    if parts.get("incident") is not None:
        incident: dict[str, Any] = dict(parts["incident"])
        if "cause" in incident:
            incident["cause"] = Cause[str(incident["cause"])]
        parts["incident"] = _record(Incident, incident)
    return _record(DetectorState, parts)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return list(value)
    # By its name: the value is a sentence, which may be put better in a later release.
    return value.name if isinstance(value, Cause) else value


def _record(kind: type[Record], values: Any) -> Record:
    """A record of the given kind from plain values."""
    names = {part.name for part in fields(kind)}  # pyright: ignore[reportArgumentType]
    if not isinstance(values, Mapping) or set(values) != names:
        raise ValueError(
            f"state_dict must have {sorted(names)} for {kind.__name__}, got {values!r}; pass what"
            " detector.state_dict(state) returned"
        )
    return built(kind, values)
