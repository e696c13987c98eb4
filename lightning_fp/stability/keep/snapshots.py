"""Which snapshots to keep: a few, at growing age, within a bound on memory.

A suspicion comes some steps after the anomaly began, a slow one many: the newest snapshot may have
the fault in it already. But each step back costs. So some are young and some are old, and of an
anomaly the newest from before it is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lightning_fp.argument_types import checked
from lightning_fp.stability.keep.host_memory import HostMemory
from lightning_fp.stability.keep.snapshot import LiveState, Part, Snapshot, stated_bytes
from lightning_fp.state_version import check_version

STATE_VERSION = 1

MOST_KEPT = 64
"""Levels there can be: with the least growth the last one would be 2^63 steps old."""


class Snapshots:
    """Keeps the newest state of a run and older ones, each level `growth` times as old.

    Level 0 is the newest snapshot; level i holds one that is between n * growth^(i-1) and
    n * growth^i steps old, n being `every_n_steps`. One moves up when it gets too old for its
    level and is needed above, like a carry in counting. With one taken whenever it is `due`, and
    the defaults in brackets:

    - Ages are below n (16), from n to n * growth (16 to 64), from there to n * growth² (256).
    - From the second snapshot on there is always one at least n steps old, if depth > 1.
    - Of a step up to n * growth^(i-1) (16, 64) ago `newest_before` finds a snapshot less than
      n * growth^i (64, 256) steps old, 0 < i < depth, once the run has been that long.

    Where steps were missed snapshots can be older than that, but none is younger than its level.

    One can be held beyond its age (`take(…, keep_from=…)`), in the place of another: never are more
    than `depth` kept, so the memory that is stated stays the bound.

    Memory of dropped snapshots is used again: in a steady state nothing is allocated.
    To keep snapshots elsewhere, write out `Snapshot.state_dict()`.

    Args:
        depth: how many to keep.
        every_n_steps: optimizer steps between two.
        growth: how much older each is than the one before.
        limit_bytes: bound on the host memory of all together; fewer are kept if need be.
    """

    @checked
    def __init__(
        self,
        *,
        depth: int = 3,
        every_n_steps: int = 16,
        growth: int = 4,
        limit_bytes: int | None = None,
    ) -> None:
        for name, value, least in (
            ("depth", depth, 1),
            ("every_n_steps", every_n_steps, 1),
            ("growth", growth, 2),
            ("limit_bytes", 1 if limit_bytes is None else limit_bytes, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if depth > MOST_KEPT:
            raise ValueError(f"depth must be at most {MOST_KEPT}, got {depth}")
        self.depth = depth
        self.every_n_steps = every_n_steps
        self.growth = growth
        self.limit_bytes = limit_bytes
        self._levels: list[Snapshot | None] = [None] * depth
        self._held: Snapshot | None = None
        """One that its level has dropped, and that is needed still."""
        self._needed: Snapshot | None = None
        """The one that must not be dropped."""
        self._spare: list[HostMemory] = []

    # -- reading --------------------------------------------------------------------------------

    @property
    def kept(self) -> list[Snapshot]:
        """The snapshots, newest first."""
        there = [snapshot for snapshot in (*self._levels, self._held) if snapshot is not None]
        return sorted(there, key=lambda snapshot: -snapshot.step)

    @property
    def oldest_step(self) -> int | None:
        """The step of the oldest; None if there is none."""
        return min((snapshot.step for snapshot in self.kept), default=None)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory in use, with what waits to be used again."""
        return sum(s.nbytes for s in self.kept) + sum(m.content.numel() for m in self._spare)

    def newest_before(self, step: int) -> Snapshot | None:
        """The newest one taken at or before `step`; None if there is none."""
        return next((snapshot for snapshot in self.kept if snapshot.step <= step), None)

    def stated_bytes(self, parts: Mapping[str, Part]) -> int:
        """What all snapshots will take at most once optimizers have stepped.

        Raises:
            ValueError: if not even one is within `limit_bytes`.
        """
        one = stated_bytes(parts, stepped=True)
        return one * self._fitting(one)

    # -- taking ---------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether it is time to take one, after `step` optimizer steps."""
        # Where the count of steps has gone back, the newest is of a later step, and of no use.
        newest = max((snapshot.step for snapshot in self.kept), default=None)
        return newest is None or not newest <= step < newest + self.every_n_steps

    def take(
        self, step: int, parts: Mapping[str, Part], *, keep_from: int | None = None
    ) -> Snapshot | None:
        """Take one and drop those that are not needed any more; see `snapshot.take`.

        One that is taken before it is due replaces the newest; those of later steps are dropped.

        Args:
            step: optimizer steps done.
            parts: of what; the same each time.
            keep_from: the newest from this step or before it is held, however old it gets; where
                there is none, the oldest. None holds none.

        Returns:
            None if only one is kept, and that has to be an older one.

        Raises:
            ValueError: if not even one is within `limit_bytes`.
        """
        # Its size is known before it is copied: room is made first, so that at no moment more than
        # the limit is in use.
        present = LiveState(parts)
        nbytes = present.nbytes
        depth = self._fitting(nbytes)
        self.drop_after(step)
        self._hold(step, keep_from)
        if self._needed is not None and depth == 1:
            return None
        self._make_room(0, step)
        self._bound(nbytes, depth)
        reuse = next((m for m in self._spare if m.content.numel() == nbytes), None)
        self._spare = [memory for memory in self._spare if memory is not reuse]
        snapshot = present.store(step, reuse)
        self._levels[0] = snapshot
        return snapshot

    def drop_after(self, step: int) -> None:
        """Forget those of later steps, as after a rollback."""
        for level, snapshot in enumerate(self._levels):
            if snapshot is not None and snapshot.step > step:
                self._drop(level)
        if self._held is not None and self._held.step > step:
            self._let_go()

    def clear(self) -> None:
        """Forget all of them and free their memory."""
        self._needed = None
        self._let_go()
        for level in range(self.depth):
            self._drop(level)
        self._spare.clear()

    def _hold(self, step: int, keep_from: int | None) -> None:
        """See which one is needed; the one that was, and is not, goes."""
        kept = self.kept
        self._needed = None
        if keep_from is not None and keep_from < step and kept:
            self._needed = self.newest_before(keep_from) or kept[-1]
        if self._held is not self._needed:
            self._let_go()

    def _let_go(self) -> None:
        snapshot, self._held = self._held, None
        self._free(snapshot)

    def _make_room(self, level: int, step: int) -> None:
        """Empty a level: its snapshot moves up if it is needed there, else it is dropped."""
        snapshot, up = self._levels[level], level + 1
        if snapshot is None:
            return
        if up < self.depth and self._too_old(snapshot, level, step):
            above = self._levels[up]
            if above is None or self._too_old(above, up, step):
                self._make_room(up, step)
                self._levels[up], self._levels[level] = snapshot, None
                return
        self._drop(level)

    def _too_old(self, snapshot: Snapshot, level: int, step: int) -> bool:
        return step - snapshot.step >= self.every_n_steps * self.growth**level

    def _drop(self, level: int) -> None:
        snapshot, self._levels[level] = self._levels[level], None
        if snapshot is not None and snapshot is self._needed:
            self._held = snapshot
        else:
            self._free(snapshot)

    def _free(self, snapshot: Snapshot | None) -> None:
        memory = None if snapshot is None else snapshot.drop()
        if memory is not None:
            self._spare.append(memory)

    def _fitting(self, nbytes: int) -> int:
        """How many of this size to keep."""
        if self.limit_bytes is None or nbytes == 0:
            return self.depth
        if nbytes > self.limit_bytes:
            raise ValueError(
                f"limit_bytes must be at least {nbytes} for one snapshot of this model and its"
                f" optimizers ({_gib(nbytes)}), got {self.limit_bytes} ({_gib(self.limit_bytes)});"
                " allow more (PrecisionFallback(snapshot_bytes=...)), shard the model, or keep"
                " snapshots on disk"
            )
        return min(self.depth, self.limit_bytes // nbytes)

    def _bound(self, nbytes: int, depth: int) -> None:
        """Before one of `nbytes` is taken: keep to the limit, oldest first, and free what is spare.

        Level 0 is empty, and at most one spare memory will be used.
        """
        for level in reversed(range(self.depth)):
            if level >= depth or len(self.kept) >= depth:
                self._drop(level)
        self._spare = [m for m in self._spare if m.content.numel() == nbytes]
        if self.limit_bytes is None:
            self._spare = self._spare[: self.depth - len(self.kept)]
            return
        level = self.depth
        while sum(s.nbytes for s in self.kept) + nbytes > self.limit_bytes:
            level -= 1
            if level < 0:  # even the one that is held has to go
                self._let_go()
            else:
                self._drop(level)
        room = (self.limit_bytes - sum(s.nbytes for s in self.kept)) // max(nbytes, 1)
        self._spare = [m for m in self._spare if m.content.numel() == nbytes][:room]

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self, without: Collection[str] = ()) -> dict[str, Any]:
        """The snapshots for a checkpoint, less some parts; their memory is shared, not copied."""
        levels = [None if s is None else s.state_dict(without) for s in self._levels]
        held = None if self._held is None else self._held.state_dict(without)
        return {"version": STATE_VERSION, "levels": levels, "held": held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over snapshots from a checkpoint; those deeper than `depth` are left out.

        Raises:
            ValueError: if the state is of a version this package does not know.
        """
        state = check_version(state, STATE_VERSION, "snapshots' state")
        self.clear()
        *saved, held = [
            None if s is None else Snapshot.from_state_dict(s)
            for s in (*state["levels"], state.get("held"))
        ]
        self._levels = (saved + [None] * self.depth)[: self.depth]
        if len(self.kept) < self.depth:
            self._held = self._needed = held


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3g} GiB"
