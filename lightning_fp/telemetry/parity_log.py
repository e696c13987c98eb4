"""ParityLog: now and then, what the formats of now do to a step, against high precision."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from lightning_fp.argument_types import checked
from lightning_fp.choices import check_at_least
from lightning_fp.layers.table_owner import TableOwner
from lightning_fp.rank_group import is_first
from lightning_fp.records.parity import append_parity
from lightning_fp.stability import Parity, measure_parity
from lightning_fp.stability.replay.parity import Run
from lightning_fp.state_version import check_version, reads
from lightning_fp.telemetry.run_telemetry import RunTelemetry

log = logging.getLogger(__name__)

STATE_VERSION = 1

_MOST_KEPT = 100

_NUMBERS = [field.name for field in fields(Parity) if field.type in ("float", float)]

PUBLISHED = tuple(f"precision/parity/{name}" for name in _NUMBERS)
"""The names on the board."""


@checked
@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """How often a step is compared, and how closely.

    Raises:
        ValueError: for an option out of range.
    """

    every_n_steps: int = 500
    """One probe per so many optimizer steps."""

    worst: int = 4
    """How many layers to put into high precision one at a time."""

    log_layers: Sequence[str] = ()
    """Globs over layer names; these layers go to the loggers as well."""

    seed: int | None = 0
    """Chooses the step within each `every_n_steps`; None takes the first."""

    def __post_init__(self) -> None:
        check_at_least(1, every_n_steps=self.every_n_steps)
        if self.worst < 0:
            raise ValueError(f"worst must not be negative, got {self.worst}")
        if isinstance(self.log_layers, str):
            raise ValueError(f"log_layers must be a list of globs, got {self.log_layers!r}")

    def settings(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "log_layers": list(self.log_layers)}

    def named(self, owner: TableOwner) -> set[str]:
        """The layers that the loggers get one by one.

        Raises:
            ValueError: for a glob that matches none.
        """
        return {name for glob in self.log_layers for name in owner.precision_map.matching(glob)}


class ParityLog:
    """Says when a probe is due, makes it and writes it down; a failure in here harms no run.

    Args:
        options: how often, and how closely.
    """

    def __init__(self, options: ParityOptions) -> None:
        self.options = options
        self.results: dict[int, Parity] = {}
        """The last 100 probes by optimizer steps done, the same on every rank."""
        self._last = -1
        self._failed = False

    def due(self, step: int) -> bool:
        """Whether the period that `step` is in still has its probe to come, and it is time."""
        every, seed = self.options.every_n_steps, self.options.seed
        period = step // every
        if period == self._last:
            return False
        if seed is None:
            return step >= period * every
        # Of its own and a function of the period alone: it touches no other generator, and goes
        # on the same after a resume.
        chosen = random.Random(f"{seed}/{period}").randrange(every)
        return step >= period * every + chosen

    def probe(
        self,
        owner: TableOwner,
        run: Run,
        model: nn.Module,
        *,
        telemetry: RunTelemetry,
        directory: Path | None,
        step: int,
        shown_at: int | None = None,
    ) -> None:
        """Probe between two steps; alike on all ranks.

        Args:
            owner: of the table.
            run: replays the coming step's batch.
            model: what it calls, with its wrappers.
            telemetry: where the numbers are published and shown.
            directory: where the probe is written down; None where this rank writes nothing.
            step: optimizer steps done.
            shown_at: the step under which loggers are shown them; None: `step`.
        """
        # First, so that a probe that fails is not tried again at every step of its period.
        self._last = step // self.options.every_n_steps
        try:
            # What was written to the table holds from the coming step on, which is what is probed.
            owner.boundary()
            self._probe(owner, run, model, telemetry, directory, step, shown_at)
        except Exception as error:
            if not self._failed:
                message = "the parity probe failed at step %d, training goes on: %s"
                log.warning(message, step, error, exc_info=True)
            self._failed = True

    def _probe(
        self,
        owner: TableOwner,
        run: Run,
        model: nn.Module,
        telemetry: RunTelemetry,
        directory: Path | None,
        step: int,
        shown_at: int | None,
    ) -> None:
        began, table = perf_counter(), owner.precision_map
        high, worst = owner.high_precision, self.options.worst
        self.results[step] = parity = measure_parity(run, model, table, high, worst=worst)
        while len(self.results) > _MOST_KEPT:
            del self.results[next(iter(self.results))]
        for name in _NUMBERS:
            telemetry.board.publish(f"precision/parity/{name}", step, float(getattr(parity, name)))
        if not is_first():
            return
        if directory is not None:
            seconds = perf_counter() - began
            append_parity(directory, {"step": step, "seconds": seconds, **asdict(parity)})
        shown = _metrics(parity, self.options.named(owner))
        telemetry.log_metrics(shown, step if shown_at is None else shown_at)

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The period probed last."""
        return {"version": STATE_VERSION, "last": self._last}

    @reads("ParityProbe state")
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        self._last = int(check_version(state, STATE_VERSION, "ParityProbe state")["last"])


def _metrics(parity: Parity, layers: set[str]) -> dict[str, float]:
    """What goes to the loggers; the first three have the same names in every run."""
    metrics = {
        "loss_gap": parity.loss_gap,
        "grad_cosine": parity.grad_cosine,
        "grad_norm_ratio": parity.grad_norm_ratio,
    }
    for layer in parity.layers:
        if layer.layer in layers:
            metrics[f"{layer.layer}/grad_cosine"] = layer.cosine
            metrics[f"{layer.layer}/grad_norm_ratio"] = layer.norm_ratio
            metrics[f"{layer.layer}/cast_error"] = layer.cast_error
    return {f"precision/parity/{name}": value for name, value in metrics.items()}
