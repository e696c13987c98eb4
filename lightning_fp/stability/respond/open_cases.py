"""Acquittals are provisional: the case stays open, and is asked again.

A slow fault is probed before it has done harm, and acquitted. Taking that for good cost 32% of the
loss, and a grace after it let a rise at step 135 wait until step 228. Where something else has
raised the loss, a fault of precision may follow. So the question comes again after 4, 8, 16 steps
and so on, and sooner while the loss is up. It is asked by a forward gap, not by ever longer
trajectories (16 forward passes against 192 to 256 steps). What began since the last look that was
calm can be traced from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_fp.argument_types import built
from lightning_fp.stability.replay.gap import Gap


@dataclass(frozen=True, kw_only=True)
class CasesState:
    """The open case, if there is one, and the last calm look."""

    began: int | None = None
    """Step at which what the open case is about may have begun; None without a case."""

    asked: int = 0
    """Step of the last question."""

    wait: int = 0
    """Steps from that to the next."""

    calm_at: int | None = None
    """Step of the last look whose gap was that of a healthy run."""

    doubted: bool = False
    """Whether the last look was not calm."""

    baseline: float | None = None
    """Where the loss had risen, for a reason that was not precision's: its level at the last calm
    look, or from before. What stands above that is left to explain; None where nothing had."""

    noise: float | None = None
    """Of a healthy step's loss, around that."""


@dataclass(frozen=True, kw_only=True)
class OpenCases:
    """When to ask again. Pure: old states stay usable. Two suspicions at a time are one case."""

    first: int = 4
    """Steps to the first question again, and at least between two."""

    longest: int = 256
    """Steps between two questions after which a case is closed."""

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.longest:
            raise ValueError(
                f"first must be from 1 to longest ({self.longest}), got {self.first!r}"
            )

    def init(self) -> CasesState:
        """No case."""
        return CasesState()

    def looked(
        self, state: CasesState, step: int, gap: Gap, loss: float | None = None
    ) -> CasesState:
        """A forward gap was measured, for whatever reason.

        After a doubtful look a single calm one does not count: weights that adapt to a fault take
        the gap through zero.

        Args:
            state: what was seen before.
            step: the step.
            gap: what was measured.
            loss: mean of the batches in the run's formats, if that is known.
        """
        calm = gap.calm and not state.doubted
        state = replace(
            state,
            calm_at=step if calm else state.calm_at,
            doubted=not gap.calm,
            baseline=loss if calm and state.baseline is not None else state.baseline,
        )
        if state.began is None:
            return state
        # After a rise of another kind errors are larger as long as it lasts, and that is no news.
        longer = calm or state.baseline is not None
        state = replace(state, asked=step, wait=2 * state.wait if longer else self.first)
        return self.closed(state) if state.wait > self.longest else state

    def acquitted(
        self,
        state: CasesState,
        step: int,
        onset: int,
        level: tuple[float, float] | None = None,
    ) -> CasesState:
        """Precision has done no harm yet: ask again, each time after twice as long.

        Args:
            state: what was seen before.
            step: the step of the verdict.
            onset: the first anomalous step.
            level: baseline and noise of the loss from before it rose; None where it had not.
        """
        if level is not None and state.baseline is None:
            state = replace(state, baseline=level[0], noise=level[1])
        if state.began is None:
            return replace(state, began=onset, asked=step, wait=self.first)
        wait = state.wait if state.calm_at == step else 2 * state.wait
        state = replace(state, began=min(state.began, onset), asked=step, wait=wait)
        return self.closed(state) if wait > self.longest else state

    def due(self, state: CasesState, step: int, *, risen: bool = False) -> bool:
        """Whether to ask again now.

        Args:
            state: what was seen before.
            step: the step.
            risen: whether the loss is above its level: then eight times as often.
        """
        if state.began is None:
            return False
        wait = max(self.first, state.wait // 8) if risen else state.wait
        return step - state.asked >= wait

    def onset(self, state: CasesState, step: int) -> int:
        """Where the harm that shows now began at the earliest.

        Args:
            state: what was seen before.
            step: this step.

        Returns:
            0 where no look has shown anything else: a format may be too coarse from the start.
        """
        if state.began is None:
            return 0 if state.calm_at is None else min(step, state.calm_at)
        return state.began if state.calm_at is None else max(state.began, state.calm_at)

    def keep_from(self, state: CasesState) -> int | None:
        """The step of which the newest snapshot from before must be kept; None without a case."""
        return None if state.began is None else self.onset(state, state.asked)

    def closed(self, state: CasesState) -> CasesState:
        """The case is over: convicted, taken back, or asked often enough."""
        return CasesState(calm_at=state.calm_at, doubted=state.doubted)

    def state_dict(self, state: CasesState) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(state)

    def load_state_dict(self, saved: Mapping[str, Any]) -> CasesState:
        """See `state_dict`."""
        return built(CasesState, saved)
