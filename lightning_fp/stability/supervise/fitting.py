"""Room for a demotion: in high precision backward keeps more than the run may have memory for.

So formats are tried on a recorded step before layers get them. Where memory does not suffice, the
run computes the activations of its blocks again from there on, until layers are promoted and it
does. Where that does not help, as many layers as there is room for are demoted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice

from lightning_fp.counting import counted
from lightning_fp.layers import LinearFormat
from lightning_fp.stability.keep.batch_ring import RecordedStep
from lightning_fp.stability.supervise.supervised_loop import SupervisedLoop
from lightning_fp.stability.supervise.trial import can_run


def fitting(
    loop: SupervisedLoop,
    step: RecordedStep | None,
    formats: Mapping[str, LinearFormat],
    note: Callable[[str], object],
) -> Mapping[str, LinearFormat]:
    """Of a demotion as many layers, from the first, as the run has memory for.

    Args:
        loop: what trains, between two optimizer steps; call this alike on all ranks.
        step: a step that has run in the present formats; None if none may be run again.
        formats: what layers are to get.
        note: takes what the user should know of it.
    """
    if loop.whole or can_run(loop, step, formats):
        return formats
    if not can_run(loop, step, {}):  # then the step is at fault, whatever the formats
        return formats
    # Compiled code has the blocks' forward in it, and would not see that they compute again.
    blocks = 0 if loop.compiled else loop.recomputation.begin_in_the_run()
    if blocks and can_run(loop, step, formats):
        note(
            "there is too little memory for the safer formats: from here on"
            f" {counted(blocks, 'block')} of the model will compute activations again in each"
            " backward pass. That takes about a third more time, and whatever the code of these"
            " blocks counts or logs happens twice"
        )
        return formats
    loop.recomputation.end_in_the_run()
    left = dict(formats)
    while left and not can_run(loop, step, left):
        left = dict(islice(left.items(), len(left) // 2))
    note(f"there is memory to demote only {len(left)} of {counted(len(formats), 'layer')}")
    return left


def keep_again(
    loop: SupervisedLoop, step: RecordedStep | None, note: Callable[[str], object]
) -> None:
    """After a promotion the run may have memory for all activations again.

    Args:
        loop: see `fitting`.
        step: see `fitting`.
        note: see `fitting`.
    """
    recomputation = loop.recomputation
    if step is None or not recomputation.in_the_run:
        return
    recomputation.end_in_the_run()
    if can_run(loop, step, {}):
        note("there is memory for all activations again: no block computes them twice any more")
    else:
        recomputation.begin_in_the_run()
