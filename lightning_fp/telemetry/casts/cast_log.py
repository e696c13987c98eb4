"""CastLog: what formats do to every layer's numbers, as rows, curves and warnings.

A step whose casts are looked at takes 1.4 times as long, eager (benchmarks/README.md). So one step
in a window is sampled; what delayed scaling knows anyway, amax and headroom, is taken from every
step. Sums stay on the device until the log interval ends, and are reduced over ranks there, all
layers in one piece. It changes no format: the fallback's limits, gates of a rollout and the user
act on what it measures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from lightning_fp.argument_types import checked
from lightning_fp.choices import check_at_least
from lightning_fp.layers.statistics_table import observable
from lightning_fp.layers.table_owner import TableOwner
from lightning_fp.rank_group import is_first
from lightning_fp.records import StatisticsRows, StatisticsWriter, statistics_rows
from lightning_fp.state_version import check_version, reads
from lightning_fp.telemetry.casts.remedies import Limits, Warnings
from lightning_fp.telemetry.casts.sampling import Listener, SampledSteps, StepSampler
from lightning_fp.telemetry.casts.summary import (
    COLUMNS,
    flops_share,
    of_column,
    per_layer,
    summary,
)
from lightning_fp.telemetry.failsafe import Failsafe
from lightning_fp.telemetry.over_ranks import any_rank
from lightning_fp.telemetry.run_telemetry import RunTelemetry

log = logging.getLogger(__name__)

STATE_VERSION = 1


@checked
@dataclass(frozen=True, kw_only=True)
class CastOptions:
    """What is measured, how often, and what is warned of.

    Raises:
        ValueError: for an option out of range.
    """

    every_n_steps: int = 16
    """Length of a window, of which one step is sampled."""

    sample: int = 8
    """SQNR and the error of the output are computed on every `sample`-th row."""

    what_if: bool = False
    """Whether sampled steps also compute what other scalings would have done."""

    log_layers: Sequence[str] = ()
    """Globs of the layers whose statistics go to the loggers one by one."""

    log_every_n_steps: int | None = None
    """Length of a log interval; None takes the loop's."""

    warn_clamped_mass: float | None = 1e-2
    """Clamped mass from which on to warn; None never does."""

    warn_underflow: float | None = 0.25
    """Share of non-zero elements flushed to zero from which on to warn."""

    warn_nonfinite: int | None = 1
    """Number of inf and NaN elements in an interval from which on to warn."""

    seed: int = 0
    """Of the sampled steps; the same on all ranks."""

    def __post_init__(self) -> None:
        check_at_least(1, every_n_steps=self.every_n_steps, sample=self.sample)
        check_at_least(1, log_every_n_steps=self.log_every_n_steps)
        if isinstance(self.log_layers, str):
            raise ValueError(f"log_layers must be a list of globs, got {self.log_layers!r}")

    @property
    def limits(self) -> Limits:
        """From where on to warn."""
        return Limits(
            clamped_mass=self.warn_clamped_mass,
            underflow=self.warn_underflow,
            nonfinite=self.warn_nonfinite,
        )

    def settings(self) -> dict[str, Any]:
        """The options that decide what is done, as plain data."""
        return {
            "every_n_steps": self.every_n_steps,
            "sample": self.sample,
            "what_if": self.what_if,
            "log_layers": list(self.log_layers),
            "log_every_n_steps": self.log_every_n_steps,
            "limits": asdict(self.limits),
            "seed": self.seed,
        }

    def named(self, owner: TableOwner) -> list[str]:
        """The layers that the loggers get one by one.

        Raises:
            ValueError: for a glob that matches none.
        """
        found = [n for glob in self.log_layers for n in owner.precision_map.matching(glob)]
        return list(dict.fromkeys(found))


class CastLog(Failsafe):
    """Samples steps, and tells at the end of each log interval; failures in here harm no run.

    Args:
        options: what is measured.
        name: who measures, for the line that says it has failed.
    """

    def __init__(self, options: CastOptions, name: str = "ClampMonitor") -> None:
        super().__init__(name, "statistics")
        self.options = options
        self.latest: StatisticsRows | None = None
        """The rows of the last interval."""
        self.listeners: list[Listener] = []
        """Called with every sampled step as it ends; see `sampling.Listener`."""
        self._steps = SampledSteps(options.every_n_steps, options.seed)
        self._warnings = Warnings(options.limits)
        self._sampler: StepSampler | None = None
        self._writer: StatisticsWriter | None = None
        self._run: RunTelemetry | None = None
        self._owner: TableOwner | None = None
        self._device = torch.device("cpu")
        self._logged_at, self._interval = 0, 1

    # -- set-up ---------------------------------------------------------------------------------

    def open(
        self,
        owner: TableOwner,
        run: RunTelemetry,
        directory: Path | None,
        *,
        step: int,
        interval: int,
        device: torch.device,
    ) -> None:
        """Observe the layers from here on.

        Args:
            owner: of the table.
            run: where measurements are published and shown.
            directory: where rows go; None where this rank writes nothing.
            step: optimizer steps done.
            interval: the loop's log interval in steps; 0 where it has none.
            device: where collectives run.
        """
        options = self.options
        self._interval = options.log_every_n_steps or interval or options.every_n_steps
        self._owner, self._run, self._device = owner, run, device
        self._logged_at, self.failed = step, False
        self._safely(self._open, owner, directory, step)

    def _open(self, owner: TableOwner, directory: Path | None, step: int) -> None:
        table, options = owner.precision_map, self.options
        layers = observable(table.layers)
        self._sampler = StepSampler(
            layers,
            options.sample,
            self._steps,
            what_if=options.what_if,
            listeners=self.listeners,
        )
        if options.what_if:
            table.follow(True)
        table.scale_history.take_amax_record()  # what was before
        if directory is not None:
            self._writer = StatisticsWriter(directory, step=step)

    # -- sampled steps --------------------------------------------------------------------------

    def before_batch(self, step: int) -> None:
        """Begin to collect, if this is the first micro-batch of a sampled step.

        Args:
            step: optimizer steps done.
        """
        if self._sampler is not None:
            self._safely(self._rewind_to, step)
            self._safely(self._sampler.before_batch, step)

    def sample_next(self) -> None:
        """Sample the next step to begin as well, out of turn. Call alike on all ranks."""
        self._steps.asked = True

    def _rewind_to(self, step: int) -> None:
        """Where the run was rolled back, so are its records."""
        if step < self._logged_at:
            self._logged_at = step
            if self._writer is not None:
                self._writer.rewind(step)

    def after_backward(self) -> None:
        """Take in what backward recorded."""
        if self._sampler is not None:
            self._safely(self._sampler.after_backward)

    def after_batch(self, step: int) -> bool:
        """End a sampled step.

        Args:
            step: optimizer steps done.

        Returns:
            Whether the log interval is over, and `tell` is due.
        """
        if self._sampler is not None:
            self._safely(self._sampler.after_batch, step)
        # Not `step % interval`: the count may go up by two, and step over a multiple.
        return step // self._interval > self._logged_at // self._interval

    # -- log intervals --------------------------------------------------------------------------

    def tell(
        self, step: int, in_bar: Callable[[Mapping[str, float]], object] = lambda _: None
    ) -> None:
        """What the interval has shown; on all ranks, or none.

        Args:
            step: optimizer steps done.
            in_bar: shows the numbers to who looks on.
        """
        run, owner, began = self._run, self._owner, self._logged_at // self._interval
        if run is None or owner is None:
            return
        self._logged_at = step
        # A rank whose log has failed would be missing in `over_ranks`, and the others wait.
        if any_rank(self.failed, self._device):
            self.close()
        else:
            self._safely(self._tell, run, owner, step, began * self._interval, in_bar)

    def _tell(
        self,
        run: RunTelemetry,
        owner: TableOwner,
        step: int,
        began: int,
        in_bar: Callable[[Mapping[str, float]], object],
    ) -> None:
        table = owner.precision_map
        sampled = [] if self._sampler is None else self._sampler.over_ranks()
        self.latest = rows = statistics_rows(sampled, table.scale_history.take_amax_record())
        values = {**summary(rows), "fp8/share": flops_share(owner)}
        for name in run.board.followed & set(COLUMNS):
            run.board.publish(name, step, of_column(rows, name), since=began)
        in_bar(values)
        run.show({**values, **per_layer(rows, self.options.named(owner))}, step, since=began)
        if self._writer is not None:
            self._writer.append(rows.columns(step))
        if is_first():
            for warning in self._warnings.of(rows, table.known.backend):
                log.warning("%s", warning)

    # -- the end --------------------------------------------------------------------------------

    def finish(self, step: int, *, alone: bool = True) -> None:
        """Tell what is left, and write everything out.

        Args:
            step: optimizer steps done.
            alone: whether all ranks come here; what others have is lost where they do not.
        """
        if alone and step > self._logged_at:
            self.tell(step)
        self.close()

    def let_go(self) -> None:
        """Leave the layers as they were."""
        if self.options.what_if and self._owner is not None:
            self._safely(self._owner.precision_map.follow, False)
        self.close()
        self._owner = None

    def close(self) -> None:
        """Measure no more, and write out what was measured."""
        self._run = None
        writer, self._writer = self._writer, None
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            sampler.close()
        if writer is not None:
            self._even_so(writer.flush)

    @override
    def _fail(self) -> None:
        super()._fail()
        if self._sampler is not None:
            self._sampler.close()

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The step sampled last: a resumed run samples the steps that the whole run would have."""
        return {
            "version": STATE_VERSION,
            "sampled_at": self._steps.last,
            "sample_next": self._steps.asked,
        }

    @reads("ClampMonitor state")
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        state_dict = check_version(state_dict, STATE_VERSION, "ClampMonitor state")
        self._steps.last = int(state_dict["sampled_at"])
        self._steps.asked = bool(state_dict.get("sample_next", False))
