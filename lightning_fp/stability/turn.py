"""What one happening leads to, while it is being worked out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from lightning_fp.events import Event
from lightning_fp.stability import incident_events as tell
from lightning_fp.stability.actions import Action
from lightning_fp.stability.detect.detector import DivergenceDetector
from lightning_fp.stability.judge.inquiry import Inquiry
from lightning_fp.stability.respond.fallback_policy import FallbackState
from lightning_fp.stability.respond.limits import LimitWatch
from lightning_fp.stability.watch_state import WatchState


@dataclass
class Turn:
    """The watch's state as it becomes, what is to be done, and what is to be said."""

    state: WatchState
    actions: list[Action] = field(default_factory=list[Action])
    events: list[Event] = field(default_factory=list[Event])

    @property
    def armed(self) -> bool:
        """Whether formats may be blamed: the level is known, and not all was tried in vain."""
        return self.state.fallback.phase not in ("warmup", "permanent")

    def enter(self, step: int, fallback: FallbackState, reason: str) -> None:
        """The fallback's next state, told if it is another phase."""
        before = self.state.fallback.phase
        self.events += tell.changed(step, before, fallback.phase, reason)
        self.state = replace(self.state, fallback=fallback)

    def ask(self, inquiry: Inquiry) -> None:
        """The next question of the case that is open."""
        self.state = replace(self.state, inquiry=inquiry)
        self.actions.append(inquiry.question)

    def count(self, **more: int) -> None:
        """Add to the account of the steps."""
        steps = self.state.steps
        counts = {name: getattr(steps, name) + count for name, count in more.items()}
        self.state = replace(self.state, steps=replace(steps, **counts))

    def formats_changed(
        self, detector: DivergenceDetector, limits: LimitWatch | None, layers: Collection[str] = ()
    ) -> None:
        """What was seen of these layers is void, and the loss may move."""
        state = self.state
        seen = state.limits if limits is None else limits.forget(state.limits, layers)
        detected = detector.precision_changed(state.detected)
        self.state = replace(state, limits=seen, detected=detected)
