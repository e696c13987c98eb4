"""Whether layers can run in other formats at all, before running layers are switched to them.

That the format is known here says little of the layer's real input: its layout, what hooks and the
next layers do with the output in place, the memory that backward keeps. Met for the first time in
the run's own step, each of these ends the run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from lightning_fp.layers import LinearFormat
from lightning_fp.stability.keep.batch_ring import RecordedStep
from lightning_fp.stability.replay.loop import Loop

log = logging.getLogger("lightning_fp.fallback")


def can_run(loop: Loop, step: RecordedStep | None, formats: Mapping[str, LinearFormat]) -> bool:
    """Run a recorded batch forward and backward in other formats, in the memory of the run.

    Args:
        loop: what trains, between two optimizer steps; call this alike on all ranks.
        step: a step that has run in the present formats; None if none may be run again.
        formats: those to try, by layer.

    Returns:
        Whether it ran, on all ranks; also where no step can be run again, as nothing is known then.
    """
    run = None if step is None or not step.micro_batches else loop.replay(step, recompute=False)
    if run is None:
        return True
    outcome = "failed"
    try:
        outcome = run(formats).outcome
    except Exception as error:  # whatever kernels, hooks and the user's own code may raise
        tried = ", ".join(f"{layer} in {format.name}" for layer, format in formats.items())
        log.warning("the model cannot run with %s: %s", tried, error)
    return loop.all(outcome in ("done", "no loss"))
