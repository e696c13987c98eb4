"""What has become known of the steps so far, between two steps, in the order it is told."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import asdict, replace
from typing import Any, Protocol

from lightning_fp.stability.detect.signals import StepSignals
from lightning_fp.stability.happenings import AmaxSeen, Boundary, Happening, Looked, StepSeen
from lightning_fp.stability.keep.batch_ring import BatchRing
from lightning_fp.stability.respond.limits import Excess
from lightning_fp.stability.supervise.cast_watch import CastWatch
from lightning_fp.stability.supervise.step_count import StepCount
from lightning_fp.stability.supervise.supervised_loop import SupervisedLoop


class Signals(Protocol):
    """Where the signals of steps arrive, numbered by the steps of all optimizers."""

    def take(self, *, all: bool = False) -> list[StepSignals]:
        """The steps that can be read without waiting; all, and wait for them, if asked to."""
        ...

    def fail(self) -> None:
        """All ranks are to hear, with the next step, that the watch has failed on this one."""
        ...


class Looks(Protocol):
    """What looks at the layers in sampled steps."""

    def before_batch(self, step: int) -> None:
        """A micro-batch begins."""
        ...

    def after_backward(self) -> None:
        """A backward has run."""
        ...

    def after_step(self, step: int) -> None:
        """A step has ended, the `step`th."""
        ...

    def look_again(self) -> None:
        """The next step too, out of turn."""
        ...

    def take(self) -> list[tuple[list[str], dict[str, Excess]]]:
        """The looks since the last time: which layers, and those of them over a limit."""
        ...

    def close(self) -> None:
        """Leave the layers as they were."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Which steps are sampled, and what was not taken yet."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        ...


class WatchFailedError(Exception):
    """The watch has failed on some rank, and ends on all."""


class Arrivals:
    """Brings together what comes by different ways, each late in its own way.

    Args:
        loop: what trains.
        count: of the steps.
        ring: the recorded steps, which get their results.
        signals: of the steps.
        looks: at the layers; None without limits.
        casts: of the layers; None without probes.
    """

    def __init__(
        self,
        loop: SupervisedLoop,
        count: StepCount,
        ring: BatchRing,
        *,
        signals: Signals,
        looks: Looks | None,
        casts: CastWatch | None,
    ) -> None:
        self.looks, self.casts = looks, casts
        self._loop, self._count, self._ring = loop, count, ring
        self._signals = signals
        self._waiting: list[StepSignals] = []

    def fail(self) -> None:
        """The watch has failed on this rank."""
        self._signals.fail()

    def after_step(self) -> None:
        """A step has been counted."""
        if self.looks is not None:
            self.looks.after_step(self._count.done)
        if self.casts is not None:
            self.casts.after_step(self._count.done - 1)

    def take(self, step: int) -> Generator[Happening, None, None]:
        """Between two steps: everything, and that it is all.

        Raises:
            WatchFailedError: if the watch has failed on some rank.
        """
        seen, self._waiting = self._all(), []
        if any(signals.failed for signals in seen):
            raise WatchFailedError("it has failed on another rank")
        for signals in seen:
            self._ring.set_results(
                signals.step,
                loss=signals.loss,
                grad_norm=signals.grad_norm,
                skipped=signals.skipped,
            )
            yield self._seen(signals, step)
        sound = not any(signals.skipped for signals in seen)
        for names, excesses in [] if self.looks is None else self.looks.take():
            yield Looked(at=step, names=tuple(names), excesses=excesses, sound=sound)
        for seen_at, amax in [] if self.casts is None else self.casts.take():
            yield AmaxSeen(at=step, step=seen_at, amax=amax)
        yield Boundary(at=step, sound=sound)

    def rest(self, step: int) -> tuple[StepSeen, ...]:
        """At the end: the steps of which nobody was told."""
        return tuple(StepSeen(at=step, signals=each) for each in self._all(wait=True))

    def _all(self, *, wait: bool = False) -> list[StepSignals]:
        """Signals that have arrived, with steps as they are counted here."""
        new = self._signals.take(all=wait)
        return [*self._waiting, *map(self._counted, new)]

    def _counted(self, signals: StepSignals) -> StepSignals:
        step = self._count.step(signals.step)
        return signals if step == signals.step else replace(signals, step=step)

    def _seen(self, signals: StepSignals, at: int) -> StepSeen:
        loop, half = self._loop, self._loop.half
        return StepSeen(
            at=at,
            signals=signals,
            overflowed=self._overflowed(signals.step) if signals.skipped else None,
            half=half,
            stuck=half and signals.skipped and loop.stuck,  # waits for the device, but not often
        )

    def _overflowed(self, step: int) -> str | None:
        """The layer that overflowed first in a step, at the first of its optimizers that did."""
        at, named = self._count.global_step, self._loop.overflowed
        layers = (named.get(each) for each in range(at(step), max(at(step + 1), 1)))
        return next((layer for layer in layers if layer is not None), None)

    def close(self) -> None:
        """Leave the layers as they were."""
        for each in (self.looks, self.casts):
            if each is not None:
                each.close()

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What waits to be told; signals are waited for."""
        self._waiting = self._all(wait=True)
        return {
            "layers": None if self.looks is None else self.looks.state_dict(),
            "waiting": [asdict(signals) for signals in self._waiting],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        if self.looks is not None and state["layers"]:
            self.looks.load_state_dict(state["layers"])
        self._waiting = [StepSignals(**signals) for signals in state["waiting"]]
