"""The options of a watch, whatever loop it is over."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_fp.argument_types import checked
from lightning_fp.stability.detect.detector import DivergenceDetector
from lightning_fp.stability.keep.batch_ring import BatchRing
from lightning_fp.stability.keep.snapshots import MOST_KEPT, Snapshots
from lightning_fp.stability.replay.budget import ReplayBudget
from lightning_fp.stability.respond.fallback_policy import FallbackPolicy
from lightning_fp.stability.respond.limits import LayerLimit
from lightning_fp.stability.respond.probe import Probe
from lightning_fp.stability.supervise.supervised_loop import SupervisedLoop
from lightning_fp.stability.watch import Watch


@checked
@dataclass(frozen=True, kw_only=True, slots=True)
class WatchOptions:
    """What `PrecisionFallback` takes, and says more of.

    Raises:
        ValueError: for an option out of range.
    """

    detector: DivergenceDetector = field(default_factory=DivergenceDetector)
    """What is suspicious in loss and gradient norm."""

    policy: FallbackPolicy = field(default_factory=FallbackPolicy)
    """How long to wait, and how often to try."""

    limit: LayerLimit | None = field(default_factory=LayerLimit)
    """How much a layer's casts may lose."""

    every_n_steps: int = 128
    """One in so many steps is looked at for the limits."""

    probe_every_n_steps: int | None = 1024
    """One in so many steps, in the long run, is compared with high precision."""

    replay_budget: float = 0.05
    """Share of the steps that may be replayed, besides one incident; see `ReplayBudget`."""

    act_without_proof: bool = False
    """Whether a suspicion climbs a rung where nothing can be replayed."""

    snapshot_every_n_steps: int = 16
    """Steps from one snapshot to the next."""

    snapshots: int = 3
    """How many to keep."""

    snapshot_bytes: int | None = None
    """Most host memory for them."""

    ring_bytes: int = 2**30
    """Most host memory for recorded batches."""

    checkpoint_bytes: int = 2**30
    """Snapshots and batches go into checkpoints if they are together no larger."""

    preflight: bool = False
    """Whether to try at the start that a step in high precision fits into memory."""

    rehearse: bool = True
    """Whether to replay in the first steps as in an incident."""

    dry_run: bool = False
    """Whether only to log what would be done."""

    seed: int = 0
    """Of the steps that are looked at."""

    def __post_init__(self) -> None:
        """Check them; those of snapshots and of the ring are checked there."""
        probes = 1 if self.probe_every_n_steps is None else self.probe_every_n_steps
        for name, value, least in (
            ("every_n_steps", self.every_n_steps, 1),
            ("probe_every_n_steps", probes, 1),
            ("snapshots", self.snapshots, 1),
            ("snapshot_every_n_steps", self.snapshot_every_n_steps, 1),
            ("snapshot_bytes", 1 if self.snapshot_bytes is None else self.snapshot_bytes, 1),
            ("ring_bytes", self.ring_bytes, 1),
            ("checkpoint_bytes", self.checkpoint_bytes, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.snapshots > MOST_KEPT:
            raise ValueError(f"snapshots must be at most {MOST_KEPT}, got {self.snapshots}")
        self.make_snapshots()
        _ = self.budget

    @property
    def budget(self) -> ReplayBudget:
        """What may be replayed."""
        return ReplayBudget.with_snapshots(self.replay_budget, self.snapshot_every_n_steps)

    @property
    def probe(self) -> Probe | None:
        """When to compare gradients without a suspicion."""
        every = self.probe_every_n_steps
        return None if every is None else Probe(every_n_steps=every)

    def watch(self, loop: SupervisedLoop) -> Watch:
        """What decides.

        Args:
            loop: the run it decides about.
        """
        return Watch(
            self.detector,
            policy=self.policy,
            limit=self.limit,
            probe=self.probe,
            budget=self.budget,
            act_without_proof=self.act_without_proof,
            layers=len(loop.table.layers),
            loss_scaling=loop.loss_scaling,
            dry_run=self.dry_run,
        )

    def make_snapshots(self) -> Snapshots:
        """Room for snapshots."""
        return Snapshots(
            depth=self.snapshots,
            every_n_steps=self.snapshot_every_n_steps,
            limit_bytes=self.snapshot_bytes,
        )

    def make_ring(self) -> BatchRing:
        """Room for recorded batches."""
        return BatchRing(max_bytes=self.ring_bytes)

    def settings(self) -> dict[str, Any]:
        """Those that decide what it does, as plain data for the records."""
        return {
            "detector": asdict(self.detector),
            "policy": asdict(self.policy),
            "limit": None if self.limit is None else asdict(self.limit),
            "every_n_steps": self.every_n_steps,
            "probe_every_n_steps": self.probe_every_n_steps,
            "replay_budget": self.replay_budget,
            "act_without_proof": self.act_without_proof,
            "snapshot_every_n_steps": self.snapshot_every_n_steps,
            "snapshots": self.snapshots,
            "rehearse": self.rehearse,
            "dry_run": self.dry_run,
            "seed": self.seed,
        }
