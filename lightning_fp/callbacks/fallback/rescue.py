"""A rescue: investigate, and if precision is to blame, demote and go back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import lightning as L

from lightning_fp.callbacks.fallback.accounting import Accounting
from lightning_fp.callbacks.fallback.incident_log import AUTHOR, IncidentLog
from lightning_fp.callbacks.fallback.investigation import Case, Findings, Investigation
from lightning_fp.callbacks.fallback.run_state import RunState
from lightning_fp.layers import LinearFormat, linear_format
from lightning_fp.layers.precision_map import Change
from lightning_fp.plugins import LayerPrecision
from lightning_fp.stability.keep.batch_ring import BatchRing
from lightning_fp.stability.keep.snapshots import Snapshots
from lightning_fp.stability.respond.fallback_policy import Fallback, FallbackState
from lightning_fp.stability.respond.ladder import rungs_above
from lightning_fp.stability.respond.limits import Excess
from lightning_fp.stability.respond.verdict import Finding


@dataclass(kw_only=True)
class Rescue:
    """Carries out what the fallback decides, between two steps and alike on all ranks."""

    trainer: L.Trainer
    plugin: LayerPrecision
    fallback: Fallback
    run: RunState
    snapshots: Snapshots
    ring: BatchRing
    log: IncidentLog
    steps: Accounting
    dry_run: bool
    _changes_seen: int = 0

    def others_changes(self) -> list[Change]:
        """What others have written to the table since the last time."""
        changes = self.plugin.precision_map.changes
        new, self._changes_seen = changes[self._changes_seen :], len(changes)
        return [change for change in new if change.author != AUTHOR]

    # -- replays --------------------------------------------------------------------------------

    def probe(self, step: int) -> float | None:
        """Error of the last step's gradients against high precision; None if it cannot be had."""
        try:
            error = self._investigation().probe()
        except Exception as failure:
            self.log.failed(step, failure)
            return None
        self.steps.replayed += 0 if error is None else 2
        return error

    def investigate(
        self, state: FallbackState, case: Case
    ) -> tuple[FallbackState, Finding | None, bool]:
        """Replay, judge and act.

        Args:
            state: where the fallback stands.
            case: what is to be investigated.

        Returns:
            The new state, the finding (None if there was none to be had), and whether the run was
            taken back to earlier weights.
        """
        if not self.plugin.low_layers():
            self.log.all_high(case.step)
            return self._acquit(state, case.step), "not precision", False
        try:
            findings = self._investigation().run(case)
        except Exception as failure:
            self.log.failed(case.step, failure)
            return self.fallback.unclear(state, case.step), None, False
        self.steps.replayed += findings.replayed
        self.log.findings(case.step, findings)
        if findings.finding == "precision":
            return self._convict(state, case.step, findings)
        if findings.finding == "unclear":
            return self.fallback.unclear(state, case.step), "unclear", False
        self.log.note(case.step, f"precision is left alone; {findings.likeness}")
        return self._acquit(state, case.step), "not precision", False

    def _investigation(self) -> Investigation:
        return Investigation(
            self.trainer,
            self.plugin,
            self.ring,
            self.snapshots.kept[::-1],
            self.run.take,
            self.run.restore_weights,
        )

    # -- verdicts -------------------------------------------------------------------------------

    def _acquit(self, state: FallbackState, step: int) -> FallbackState:
        after = self.fallback.acquitted(state, step)
        self.log.state(step, state.phase, after.phase, "precision is not to blame")
        return after

    def _convict(
        self, state: FallbackState, step: int, findings: Findings
    ) -> tuple[FallbackState, Finding, bool]:
        """Demote, and go on from where high precision would be."""
        formats, reason = self._demotion(state, findings)
        layers = self.plugin.precision_map.layers
        before = {name: layers[name].format.name for name in formats}
        self.log.state(step, state.phase, "attribute", "precision is to blame")
        self.log.attribution(step, findings)
        self.log.state(step, "attribute", "demote", reason)
        changes = self._write(formats, reason)
        self.log.demoted(step, changes, before, formats, reason, dry_run=self.dry_run)
        went_back = not self.dry_run and self._go_back(step, findings)
        after = self.fallback.convicted(state, step, before)
        hold = f"for {self.fallback.hold(after)} steps"
        self.log.state(
            step, "demote", after.phase, "for good" if after.phase == "permanent" else hold
        )
        return after, "precision", went_back

    def _demotion(
        self, state: FallbackState, findings: Findings
    ) -> tuple[dict[str, LinearFormat], str]:
        """Which layers get which format, and why."""
        high, low = self.plugin.high_precision, self.plugin.low_layers()
        everything = dict.fromkeys(low, high)
        found = findings.attribution
        culprits = {} if found is None else dict(found.formats)
        if self.fallback.gives_up(state):
            return everything, "precision did it again: high precision for good"
        if self.plugin.falls_back_whole:
            return everything, "all layers, and what is between them"
        if not culprits:
            return everything, "no few layers explain it: all layers"
        scope = self.fallback.scope(state)
        if scope == "layers":
            return culprits, "the culprits, to the first rung where they do no harm"
        groups = {_group(name) for name in (*culprits, *state.demoted)}
        if scope == "group":
            group = {name: high for name in low if _group(name) in groups}
            return group, "it came back: the culprits' whole groups"
        return everything, "it came back again: all layers"

    def _go_back(self, step: int, findings: Findings) -> bool:
        """Take over the trajectory in high precision, or else the snapshot before the fault."""
        start, end = findings.start, findings.end
        if start is None:
            return False
        undone = step - start.step
        since = self.ring.since(start.step)
        none_made = since is not None and all(recorded.skipped for recorded in since)
        if end is None and findings.weights_finite and none_made:
            return False  # no step was made with what was wrong
        skipped = 0 if since is None else sum(recorded.skipped for recorded in since)
        made_good = 0 if end is None else findings.made
        self.run.go_back(start if end is None else end)
        self.run.restore_scales(start)
        self.steps.rolled_back += undone
        self.steps.undone += undone - skipped
        self.steps.made_good += made_good
        self.log.rolled_back(step, start.step, made_good)
        self.snapshots.drop_after(start.step)
        if end is None or since is None:  # the batches since then are not part of the run any more
            self.ring.clear()
            self.snapshots.clear()
            return True
        for recorded, loss in zip(since, findings.losses, strict=False):
            left_out = not math.isfinite(loss)
            self.ring.set_results(recorded.step, loss=loss, grad_norm=None, skipped=left_out)
        return True

    # -- writes ---------------------------------------------------------------------------------

    def promote(self, state: FallbackState, step: int) -> FallbackState:
        """Probation is over: back to the formats from before the incident."""
        reason = f"{self.fallback.hold(state)} steps of probation are over"
        known = self.plugin.precision_map.known
        changes = self._write({n: known[name] for n, name in state.demoted.items()}, reason)
        self.log.promoted(step, changes, reason)
        after = self.fallback.promoted(state, step)
        self.log.state(step, state.phase, after.phase, reason)
        return after

    def climb(self, step: int, excesses: list[Excess]) -> bool:
        """Layers over their limits go up one rung; whether any did."""
        table, high = self.plugin.precision_map, self.plugin.base_format
        climbed = False
        for excess in excesses:
            layer = table.layers[excess.layer]
            rungs = rungs_above(layer.format, high, table, layer)
            if rungs:
                before = layer.format.name
                changes = self._write({excess.layer: rungs[0]}, excess.sentence)
                self.log.climbed(step, excess, before, rungs[0], changes, dry_run=self.dry_run)
                climbed = not self.dry_run
        return climbed

    def _write(self, formats: Mapping[str, LinearFormat], reason: str) -> list[Change]:
        """Through the table, as anybody; in a dry run not at all."""
        if self.dry_run:
            return []
        table = self.plugin.precision_map
        for name, format in formats.items():
            pattern = f"re:{re.escape(name)}"
            table.set(pattern, linear_format(format), reason=reason, author=AUTHOR)
        return [change for change in self.plugin.boundary() if change.author == AUTHOR]


def _group(name: str) -> str:
    """The block a layer belongs to: its name up to the first number, e.g. "model.blocks.3"."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1])
