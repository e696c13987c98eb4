"""The rehearsal: what replays on the user's own loop have left behind, and what follows from it.

In the first steps of a run, before anything is armed, steps are replayed as in an incident. What a
step can change is compared with before, bit for bit. The watch then confines itself to what was
harmless there. What a user's training step writes to cannot be known beforehand, and a replay that
leaves something behind, a counter or an average, would harm a healthy run unseen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal

from lightning_fp.stability.replay.control import TOLERATED
from lightning_fp.stability.replay.fingerprint import Item

Outcome = Literal["passed", "one step", "limits only"]

OUTCOMES: tuple[Outcome, ...] = ("passed", "one step", "limits only")
"""From all to least."""

CONSEQUENCES: Mapping[Outcome, str] = {
    "passed": "replays leave nothing behind here",
    "one step": "only single steps are replayed, and suspicions are judged by these",
    "limits only": "nothing is replayed; only limits act, and bad steps are skipped",
}

NOTHING_ELSE = "replays leave nothing else behind here"
"""What passes where all they do is append to a list that nothing depends on."""

_MANY = 3
"""Changes that a line names; of more it gives the number."""


def outcome_of(one_step: Sequence[str], trajectory: Sequence[str]) -> Outcome:
    """What the watch may replay.

    Args:
        one_step: what replays of one step have shown, a sentence each.
        trajectory: the same of trajectories.
    """
    return "limits only" if one_step else "one step" if trajectory else "passed"


def changes(by: str, owner: str, items: Sequence[Item]) -> str:
    """A line for what was not as before.

    >>> ema = Item(owner="Average", what="self.ema")
    >>> changes("on_train_batch_start", "Average", [ema])
    'on_train_batch_start of Average changes self.ema'

    Args:
        by: the hook during which it changed; empty if it was during none.
        owner: the class of the hook's object.
        items: what has changed, at least one.
    """
    named = [item.said(owner) for item in items]
    listed = ", ".join(named[:_MANY])
    listed += f" and {len(named) - _MANY} more" if len(named) > _MANY else ""
    return f"{by} of {owner} changes {listed}" if by else f"a replayed step changes {listed}"


def not_twice(losses: Sequence[float]) -> str:
    """Whether the same step had different losses, on the same weights; empty if not.

    Args:
        losses: of the same replay, several times.
    """
    apart, pair = max(((_apart(a, b), (a, b)) for a, b in combinations(losses, 2)), default=_SAME)
    if apart <= TOLERATED:
        return ""
    return f"training_step gives another loss the second time: {_numbers(*pair)}"


_SAME = (0.0, (0.0, 0.0))


def not_as_recorded(recorded: float | None, replayed: float | None) -> str:
    """Whether a step from a snapshot has another loss than it had; empty if not, or not known.

    Args:
        recorded: the loss that the run had in this step.
        replayed: the loss of the same step, run again from the snapshot before it.
    """
    if recorded is None or replayed is None or _apart(recorded, replayed) <= TOLERATED:
        return ""
    return (
        "a step repeated from a snapshot is not the same: it depends on something that snapshots do"
        f" not hold (loss {_numbers(recorded, replayed)})"
    )


def noise_of(losses: Sequence[float]) -> float:
    """How far the losses of the same replay are apart, relatively: what means nothing here."""
    return max((_apart(a, b) for a, b in combinations(losses, 2)), default=0.0)


def _apart(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def _numbers(a: float, b: float) -> str:
    """As short as tells them apart."""
    for digits in (3, 4, 6):
        first, second = f"{a:.{digits}g}", f"{b:.{digits}g}"
        if first != second:
            return f"{first} and {second}"
    return f"{a!r} and {b!r}"
