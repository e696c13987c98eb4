"""Through which modules one rescue goes, from the signal to the demotion.

`python -m tests.rescue_trace` prints them in the order in which they are entered, each with the one
that enters it. The training loop's own code is left out: that is the user's step, run again.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L

from lightning_fp import PrecisionFallback
from lightning_fp.callbacks.compare import loop_replay, step_replay
from lightning_fp.callbacks.fallback import trainer_loop
from lightning_fp.stability.happenings import Asked
from lightning_fp.stability.replay import recompute
from tests.callbacks.fallback.test_precision_fallback import Reversed, between, train
from tests.helper import supervisor_of

WATCH = ("lightning_fp.callbacks.", "lightning_fp.stability.", "lightning_fp.records.")
"""What is followed; below it are the layers."""

LOOP = {module.__name__ for module in (trainer_loop, recompute, step_replay, loop_replay)}
"""What is behind these is the loop."""

ASKED = 60


@dataclass
class Trace:
    """Modules of this package as they were entered."""

    entered: dict[str, str] = field(default_factory=dict[str, str])
    """By module, the one that has entered it first."""

    again: set[tuple[str, ...]] = field(default_factory=set[tuple[str, ...]])
    """Chains of calls that come back to a module which has called others and not returned."""


@contextmanager
def traced(trace: Trace) -> Generator[None, None, None]:
    """Follow all calls of this thread, as deep as the loop."""
    stack: list[str | None] = []
    """Of each frame the module, where it is ours and not behind the loop."""

    def follow(frame: FrameType, event: str, _: Any) -> None:
        if event == "return" and stack:
            stack.pop()
        if event != "call":
            return
        name = str(frame.f_globals.get("__name__", ""))
        chain = [each for each in stack if each is not None]
        if not name.startswith(WATCH) or not LOOP.isdisjoint(chain):
            stack.append(None)
            return
        stack.append(name)
        if chain and chain[-1] != name:
            trace.entered.setdefault(name, chain[-1])
            if name in chain:
                trace.again.add((*chain[chain.index(name) :], name))

    sys.setprofile(follow)
    try:
        yield
    finally:
        sys.setprofile(None)


class Traced(PrecisionFallback):
    """Follows what goes on between two steps, in one of them an incident."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.trace = Trace()

    def _arrived(self, batch: Any) -> None:
        with traced(self.trace):
            super()._arrived(batch)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == ASKED and between(trainer, args[-1]):
            with traced(self.trace):
                supervisor_of(self).tell(Asked(at=ASKED, onset=ASKED - 40, risen=False))
        super().on_train_batch_start(trainer, *args)


def trace_of_one_rescue(directory: Path) -> Trace:
    """Of a tiny GPT in which the gradient of one layer goes wrong."""
    fallback = Traced(dirpath=directory, rehearse=False)
    train([Reversed(), fallback], ASKED + 2, "dynamic")
    if not fallback.state_dict()["fallback"]["demotions"]:
        raise RuntimeError("nothing was demoted")
    return fallback.trace


def main() -> None:
    """Print it."""
    with tempfile.TemporaryDirectory() as directory:
        trace = trace_of_one_rescue(Path(directory))
    for module, by in trace.entered.items():
        print(f"{module:56} from {by}")
    for chain in sorted(trace.again):
        print("entered again:", " -> ".join(chain))


if __name__ == "__main__":
    main()
