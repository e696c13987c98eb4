"""What replays may cost: a share of the run's steps, and one incident.

Replays take the run's own time, and a watch that asks at every doubt can cost more than it saves:
runs of 340 steps had 479 to 518 replayed. So what is replayed is counted in steps and kept within a
bucket that fills by a share of the steps, and that holds one incident to begin with: a young run
has made few steps, and its first fault has to be answered all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

FORWARD = 1 / 3
"""A forward pass alone, in steps: backward costs twice as much."""

PROBE = 2
"""A probe, in steps: forward and backward in both precisions; one where the run makes the other."""

CURE = 8
"""A cure's check, in steps: a gap of 8 batches, and a probe."""

INCIDENT = 384
"""Replayed steps that one incident may take: a trajectory, its control and its placebo of 96 steps
each, and 96 single ones for gaps, attribution and cures."""

RESERVE = 64
"""Of these, what single steps may need once a trajectory has convicted: attribution, cures."""

TRAJECTORIES = 3
"""In high precision, the control, the placebo."""


@dataclass(frozen=True, kw_only=True)
class ReplayBudget:
    """Says what may still be replayed.

    >>> budget = ReplayBudget(share=0.05)
    >>> budget.left(steps=1000, replayed=100)
    334.0
    """

    share: float = 0.05
    """Of the run's steps."""

    incident: int = INCIDENT
    """Replayed steps besides."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(
                f"replay_budget must be a share of the steps from 0 to 1, got {self.share!r}"
            )

    @staticmethod
    def with_snapshots(share: float, every_n_steps: int) -> ReplayBudget:
        """Of a run with snapshots so far apart that trajectories are longer."""
        return ReplayBudget(share=share, incident=max(INCIDENT, 3 * every_n_steps + 96))

    def left(self, *, steps: int, replayed: int) -> float:
        """Replayed steps that are left.

        Args:
            steps: optimizer steps of the run so far.
            replayed: steps replayed so far.
        """
        return self.share * steps + self.incident - replayed

    def affords_probe(self, *, steps: int, replayed: int, probes: int) -> bool:
        """Whether one more probe is within the share: none of the incident is for these.

        Args:
            steps: see `left`.
            replayed: see `left`.
            probes: probes so far.
        """
        within = PROBE * probes <= self.share * steps
        return within and self.left(steps=steps, replayed=replayed) >= PROBE

    def affords_look(self, *, steps: int, replayed: int, batches: int) -> bool:
        """Whether batches may be compared forward that no case asks for; see `affords_probe`."""
        cost = 2 * FORWARD * batches
        return self.left(steps=steps, replayed=replayed) >= cost + RESERVE


def most_steps(left: float) -> float:
    """Steps of a trajectory that leave enough for its control, its placebo and what follows."""
    return max((left - RESERVE) / TRAJECTORIES, 0.0)
