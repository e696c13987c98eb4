"""When overflows are more than a loss scale that finds its level. Pure, as the detector is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_fp.stability.loss_scaling import LossScaling

WINDOW = 128
"""Steps over which overflows are counted."""

STORM = 16
"""Overflows in a window that are a storm: one in eight steps lost, where a scale that grows every
2000 steps overflows once in as many. A starting value, not measured on large runs."""


@dataclass(frozen=True, kw_only=True)
class OverflowState:
    """What has been seen."""

    recent: tuple[int, ...] = ()
    """Steps of the last window that overflowed, counted from the begin of the run in FP16."""

    step: int = 0
    """Steps seen since then."""

    in_a_row: int = 0
    """Overflows in a row."""

    lost: int = 0
    """Of these, those with a loss that was not finite itself."""

    found: bool = False
    """Whether the scale has been at a level that worked."""


class OverflowWatch:
    """Says when FP16's range does not suffice.

    While the scale looks for its level, overflows are what it goes by. They are an incident if the
    scale is at its least, if the loss itself overflows, which no scale helps, if more follow on
    each other than the scale needs once it has been at its level, or if they come in a storm.

    Args:
        scaling: how the scale moves.
        patience: overflows in a row that are still none, beyond the hysteresis.
    """

    def __init__(self, scaling: LossScaling, patience: int) -> None:
        self._scaling, self._patience = scaling, patience

    def step(
        self, state: OverflowState, *, skipped: bool, loss_finite: bool, stuck: bool
    ) -> tuple[OverflowState, str | None]:
        """Take in one step.

        Args:
            state: what was seen so far.
            skipped: whether its gradients overflowed.
            loss_finite: whether its loss was finite.
            stuck: whether the scale could not fall any further.

        Returns:
            What has been seen now, and a sentence if it is an incident.
        """
        begin = state.step + 1 - WINDOW
        if not skipped:
            state = replace(
                state,
                step=state.step + 1,
                in_a_row=0,
                lost=0,
                found=True,
                recent=tuple(step for step in state.recent if step > begin),
            )
            return state, None
        # Overflows by which the scale finds its level at the begin are no part of a storm.
        searching = not state.found
        recent = () if searching else (*state.recent, state.step)
        state = replace(
            state,
            step=state.step + 1,
            in_a_row=state.in_a_row + 1,
            lost=state.lost + (not loss_finite),
            recent=tuple(step for step in recent if step > begin),
        )
        return state, self._reason(state, stuck=stuck)

    def _reason(self, state: OverflowState, *, stuck: bool) -> str | None:
        if stuck:
            return "gradients overflow even at the smallest loss scale"
        if state.lost > self._patience:
            return f"the loss was inf or NaN {state.lost} times in a row, which no loss scale mends"
        if state.found and state.in_a_row > self._patience + self._scaling.hysteresis:
            return f"gradients overflowed {state.in_a_row} times in a row"
        # Each growth of the scale is answered by overflows, `hysteresis` of them, until it falls.
        interval = self._scaling.growth_interval
        usual = 0 if interval is None else WINDOW * self._scaling.hysteresis / interval
        if len(state.recent) > max(STORM, 2 * usual):
            return f"gradients overflowed in {len(state.recent)} of the last {WINDOW} steps"
        return None
