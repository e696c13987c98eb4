"""What became of a run's steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """Counts of optimizer steps; `global_step` counts attempts and never goes back."""

    attempted: int = 0
    """Steps that were begun."""

    skipped: int = 0
    """Of these, left out because a gradient was not finite."""

    rolled_back: int = 0
    """Of these, undone by going back to a snapshot."""

    made_good: int = 0
    """Of those rolled back, trained again on the same batches: they count as kept."""

    undone: int = 0
    """Of those rolled back, kept until then."""

    replayed: int = 0
    """Training steps run besides: probes, verdicts, attribution, trajectories."""

    @property
    def useful(self) -> int:
        """Steps that the model has learned from."""
        return self.attempted - self.skipped - self.undone + self.made_good

    def sentence(self) -> str:
        """E.g. "300 steps: 300 kept, 0 skipped, 0 rolled back; 9 more in replays"."""
        again = f" ({self.made_good} of them trained again)"
        if self.made_good == self.rolled_back:
            again = " and trained again" if self.rolled_back else ""
        return (
            f"{self.attempted} steps: {self.useful} kept, {self.skipped} skipped,"
            f" {self.rolled_back} rolled back{again}; {self.replayed} more in replays"
        )
