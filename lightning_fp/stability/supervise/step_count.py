"""Steps as the fallback counts them: batches after which optimizers had stepped."""

from __future__ import annotations

from typing import Any

_MOST_KEPT = 1024
"""Steps of which the `global_step` is remembered: more than there are snapshots for."""


class StepCount:
    """Counts batches that stepped, whatever the number of optimizers.

    `global_step` counts the steps of every optimizer: with two it goes up by two. All waits and
    counts of the fallback are in steps as counted here; its events say `global_step`, as all
    records of a run do. With one optimizer the two are the same.

    Args:
        done: batches that stepped so far, perhaps in a run that nobody has watched.
        global_step: steps of all optimizers so far.
    """

    def __init__(self, done: int = 0, global_step: int = 0) -> None:
        self.done = done
        """Steps done."""
        self._global = {done: global_step}

    def ended(self, global_step: int) -> None:
        """A step has ended.

        Args:
            global_step: steps of all optimizers, after it.
        """
        self.done += 1
        self._global[self.done] = global_step
        while len(self._global) > _MOST_KEPT:
            del self._global[next(iter(self._global))]

    def global_step(self, step: int) -> int:
        """`global_step` when so many steps were done."""
        return self._global.get(step, step)

    def step(self, global_step: int) -> int:
        """The steps done at that `global_step`: the inverse of `global_step`."""
        known = (s for s, at in reversed(self._global.items()) if at == global_step)
        return next(known, global_step)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"done": self.done, "global": [list(item) for item in self._global.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.done = int(state["done"])
        self._global = {int(step): int(at) for step, at in state["global"]}
