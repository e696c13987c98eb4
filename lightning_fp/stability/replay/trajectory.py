"""The steps since a snapshot once more, in other formats.

One step hides a fault of many small errors: gradients clamped by a stuck scale cost a tiny GPT 13%
of its loss, though the two precisions' losses were equal in each step that was compared. Trained on
over the same batches, with the same random numbers and learning rates, they part. The end of such a
stretch in high precision can become the run: then a conviction costs time, and no step is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from lightning_fp.layers import LinearFormat
from lightning_fp.stability.keep.batch_ring import RecordedStep
from lightning_fp.stability.keep.snapshot import Snapshot
from lightning_fp.stability.replay.loop import Loop
from lightning_fp.stability.replay.one_step import is_out_of_memory
from lightning_fp.stability.replay.paired import has_shown
from lightning_fp.stability.replay.placebo import perturb_

Outcome = Literal["done", "out of memory"]


LEAST_STEPS = 8
"""Steps that a trajectory should have: fewer tell little."""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What a stretch of training came to in other formats."""

    outcome: Outcome = "done"
    losses: Sequence[float] = ()
    """By step, mean over ranks; NaN where it was left out."""

    made: int = 0
    """Optimizer steps that were not left out."""

    formats: Mapping[str, str] = field(default_factory=dict[str, str])
    """The formats it was made in, of the layers that were given others."""

    end: Snapshot | None = None
    """The state it ended in, if that is kept."""


def replay_trajectory(
    loop: Loop,
    start: Snapshot,
    steps: Sequence[RecordedStep],
    formats: Mapping[str, LinearFormat] | None,
    *,
    compiled: bool = False,
    placebo: bool = False,
    keep_end: bool = True,
    against: Sequence[float] = (),
) -> Trajectory:
    """Train on from a snapshot with the recorded batches, and leave the run as it was.

    Args:
        loop: what trains; call this alike on all ranks.
        start: where to begin.
        steps: the steps since then, in order.
        formats: by layer, the others keep theirs; None: those of each step's time.
        compiled: whether compiled code runs as in the run; else everything runs eagerly.
        placebo: whether the weights are moved first, as `perturb_` does.
        keep_end: whether the state that it ends in is kept, as large as a snapshot.
        against: losses of the same steps in high precision: it ends as soon as its own have shown
            all that they can beside them; in any case where they are no longer finite.

    Returns:
        Losses, and the state it ended in. The run is back where it was.
    """
    before = loop.take()
    losses: list[float] = []
    made = 0
    end: Snapshot | None = None
    outcome: Outcome = "done"
    try:
        with loop.training(formats, compiled=compiled) as train:
            loop.restore(start)
            if placebo:
                perturb_(loop.model.parameters(), seed=start.step)
            for step in steps:
                own = train(step)
                made += own.made
                # Over ranks, so that all of them give up at the same step.
                losses.append(loop.mean(own.loss))
                if _hopeless(losses) or has_shown(losses, against):
                    break
            # Within: leaving puts buffers and attributes back, and the end state is of all of it.
            end = loop.take() if keep_end else None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        outcome = "out of memory"
    finally:
        loop.restore(before)
    if outcome == "out of memory" and loop.recompute():
        again = partial(replay_trajectory, loop, start, steps, formats, compiled=compiled)
        return again(placebo=placebo, keep_end=keep_end, against=against)
    given = {name: format.name for name, format in (formats or {}).items()}
    return Trajectory(outcome=outcome, losses=losses, made=made, formats=given, end=end)


def _hopeless(losses: Sequence[float]) -> bool:
    """Whether training has met nothing but inf or NaN for a while."""
    return len(losses) >= LEAST_STEPS and not any(map(math.isfinite, losses[-LEAST_STEPS:]))
