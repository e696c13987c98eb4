"""The board: all measurements of a run by name, for whoever wants to read them.

Who measures publishes, and does not know who reads. Who reads follows names, and does not know who
measures: a gate of a rollout asks for "precision/eval_gap", and any callback may have put it there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

MOST_KEPT = 4096
"""Measurements that wait for one who follows; of more the oldest are dropped."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One value."""

    step: int
    """Optimizer steps done when it was measured."""

    value: float

    since: int
    """The number of steps from which on it was gathered; `step` where it is of one moment."""


class Board:
    """Takes measurements, alike on all ranks: what is published is over all of them.

    >>> board = Board()
    >>> follower = board.follow(["loss"])
    >>> board.publish("loss", 1, 0.5)
    >>> [(m.step, m.value) for m in follower.take()["loss"]]
    [(1, 0.5)]
    """

    def __init__(self) -> None:
        self._latest: dict[str, Measurement] = {}
        self._followers: list[Follower] = []

    def publish(self, name: str, step: int, value: float, *, since: int | None = None) -> None:
        """Put a measurement up.

        Args:
            name: what was measured, e.g. "fp8/clamped_mass/max".
            step: optimizer steps done.
            value: of all ranks together; NaN where there is none.
            since: the step from which on it was gathered; None: it is of this moment.
        """
        measured = Measurement(step=step, value=value, since=step if since is None else since)
        self._latest[name] = measured
        for follower in self._followers:
            follower.hear(name, measured)

    def latest(self, name: str) -> Measurement | None:
        """The last measurement of a name."""
        return self._latest.get(name)

    @property
    def followed(self) -> set[str]:
        """The names that somebody follows: what nobody reads need not be computed."""
        return {name for follower in self._followers for name in follower.names}

    def follow(self, names: Collection[str]) -> Follower:
        """Hear of all measurements of some names from here on."""
        follower = Follower(names)
        self._followers.append(follower)
        return follower


class Follower:
    """Keeps what is published until it is taken.

    Args:
        names: what to keep.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = frozenset(names)
        """What it keeps."""
        self._new: deque[tuple[str, Measurement]] = deque(maxlen=MOST_KEPT)

    def hear(self, name: str, measured: Measurement) -> None:
        """Something was published."""
        if name in self.names:
            self._new.append((name, measured))

    def take(self) -> dict[str, list[Measurement]]:
        """What is new since the last time, by name, oldest first."""
        taken: dict[str, list[Measurement]] = {}
        while self._new:
            name, measured = self._new.popleft()
            taken.setdefault(name, []).append(measured)
        return taken
