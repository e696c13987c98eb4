"""MismatchLog: how far training is from the rollout engine, step by step, and whether that grows.

Policy gradients take the engine's samples for the trainer's own, but the two round in different
places. Log-probabilities of the sampled tokens by both sides tell how far apart they are, if both
are of the same weights. This brings them to where they are measured (`mismatch_tally`) and judged
(`early_warning`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from lightning_fp.argument_types import checked
from lightning_fp.choices import check_at_least
from lightning_fp.layers import FormatLike, linear_format
from lightning_fp.layers.table_owner import TableOwner
from lightning_fp.metrics.mismatch_names import Aliases
from lightning_fp.records.event_log import EventLog
from lightning_fp.records.mismatch_rows import MismatchWriter
from lightning_fp.rl.causes import Causes
from lightning_fp.rl.corrections import Correction, correction
from lightning_fp.stability.detect.mismatch_detector import MismatchDetector
from lightning_fp.state_version import check_version, reads
from lightning_fp.telemetry.mismatch.early_warning import Act, EarlyWarning
from lightning_fp.telemetry.mismatch.mismatch_tally import MismatchTally, RankFailedError
from lightning_fp.telemetry.run_telemetry import RunTelemetry

log = logging.getLogger(__name__)

STATE_VERSION = 1


@checked
@dataclass(frozen=True, kw_only=True)
class MismatchOptions:
    """How often mismatch is measured, and what follows.

    Raises:
        ValueError: for an option out of range.
    """

    every_n_steps: int = 1
    """One step in so many is measured."""

    detector: MismatchDetector = field(default_factory=MismatchDetector)
    """What growth is worth a warning."""

    act: Act | None = "log"
    """"log" warns; "raise-precision" also gives layers more mantissa bits, where nothing says that
    precision is not the cause; "by-cause" besides halves the bounds of `correction` where stale
    weights or routing are; None only measures."""

    raise_to: FormatLike | None = None
    """The format to raise all layers to instead of the next on the way up."""

    hold_steps: int = 256
    """Optimizer steps after such a change without another one, or a warning."""

    aliases: Aliases = "verl"
    """Whose names the metrics are logged under as well."""

    threshold: float = 2.0
    """Of importance weights, see `TrainingInferenceMismatch`."""

    correction: Correction | str | None = None
    """The bounds on importance weights that training begins with, by name or as a record."""

    def __post_init__(self) -> None:
        check_at_least(1, every_n_steps=self.every_n_steps, hold_steps=self.hold_steps)
        if self.act is not None and self.act not in get_args(Act):
            raise ValueError(
                f"act must be 'log', 'raise-precision', 'by-cause' or None, got {self.act!r}"
            )
        if self.raise_to is not None and self.act not in ("raise-precision", "by-cause"):
            raise ValueError(
                "raise_to must be None unless act is 'raise-precision' or 'by-cause', got"
                f" {self.raise_to!r}"
            )
        _ = self.bounds

    @property
    def bounds(self) -> Correction | None:
        """The correction as a record."""
        given = self.correction
        return correction(given) if isinstance(given, str) else given

    def settings(self) -> dict[str, Any]:
        """As plain data."""
        to = None if self.raise_to is None else linear_format(self.raise_to).name
        return {
            "every_n_steps": self.every_n_steps,
            "detector": asdict(self.detector),
            "act": self.act,
            "raise_to": to,
            "hold_steps": self.hold_steps,
            "aliases": self.aliases,
            "threshold": self.threshold,
            "correction": None if self.bounds is None else self.bounds.words,
        }


class MismatchLog:
    """Measures steps and judges them; alike on all ranks.

    Args:
        options: how often, and what follows.
        source: who gives the log-probabilities, to be named in errors.
        name: who measures, for the lines of the log.
    """

    def __init__(
        self, options: MismatchOptions, source: str, name: str = "MismatchMonitor"
    ) -> None:
        self.options, self._name = options, name
        self.latest: dict[str, float] | None = None
        """The metrics of the last measured step, the same on every rank."""
        self.causes: Causes | None = None
        """What its mismatch came from; None where no origin was given."""
        to = None if options.raise_to is None else linear_format(options.raise_to)
        self.warning = EarlyWarning(
            options.detector, options.act, to, options.hold_steps, options.bounds
        )
        """Judges."""
        self.tally = MismatchTally(source, options.aliases, options.threshold)
        """Takes in log-probabilities."""
        self.worked = False
        """Whether any step was measured."""
        self._measured_at = -1
        self._open: int | None = None
        self._failed = self._warned_empty = False
        self._run: RunTelemetry | None = None
        self._log = EventLog(None)
        self._owner: TableOwner | None = None
        self._writer: MismatchWriter | None = None

    def begin(
        self,
        owner: TableOwner | None,
        run: RunTelemetry,
        log: EventLog,
        directory: Path | None,
        device: torch.device,
    ) -> None:
        """Measure from here on.

        Args:
            owner: of the table to write to; None where there is none.
            run: where measurements are shown.
            log: where warnings go.
            directory: where rows go; None where this rank writes nothing.
            device: where sums are.
        """
        self.tally.start(device)
        self._owner, self._run, self._log, self._open = owner, run, log, None
        self._failed = self.worked = self._warned_empty = False
        self._writer = None if directory is None else MismatchWriter(directory)

    @property
    def running(self) -> bool:
        """Whether it measures: from `begin` to `end`, unless some rank has failed."""
        return self._run is not None

    def before_batch(self, step: int) -> bool:
        """A micro-batch begins.

        Args:
            step: optimizer steps done.

        Returns:
            Whether it is the first of a step that is measured.
        """
        if self._open is not None:
            return False
        every = self.options.every_n_steps
        self._open = step
        due = step // every > self._measured_at // every
        self.tally.measuring = self.running and due
        return self.tally.measuring

    @property
    def measuring(self) -> bool:
        """Whether the step under way is measured."""
        return self.tally.measuring and self._open is not None

    def add(self, given: Any) -> None:
        """Take in log-probabilities of a micro-batch; nothing in a step that is not measured.

        Raises:
            ValueError: in the first measured step, for what are none.
        """
        if self.measuring:
            self.guarded(self.tally.add, given)

    def after_batch(
        self, step: int, shown: Callable[[Mapping[str, float]], object] = lambda _: None
    ) -> None:
        """A micro-batch has ended; of a measured step, write down what was measured, and judge it.

        Args:
            step: optimizer steps done.
            shown: told the metrics by name.
        """
        if self._open is None or step == self._open:
            return
        begun, self._open = self._open, None
        run = self._run  # None after a failure: on all ranks, or on none
        if self.tally.measuring and run is not None:
            self.tally.measuring = False
            self.guarded(self._end_step, run, begun, shown)
            self.tally.clear()

    def _end_step(
        self, run: RunTelemetry, begun: int, shown: Callable[[Mapping[str, float]], object]
    ) -> None:
        try:
            values = self.tally.values(failed=self._failed)
        except RankFailedError:
            self._run = None
            return
        except ValueError:
            if not self.worked:
                raise
            if not self._warned_empty:
                log.warning("step %d is not measured", begun + 1, exc_info=True)
            self._warned_empty = True
            return
        if values is None:  # nobody has pushed anything: the next step may do
            return
        self.worked, self._measured_at, self.latest = True, begun, values
        self.causes = self.tally.causes
        shown(values)
        named, told = self.tally.aliases, {} if self.causes is None else self.causes.numbers()
        all_values = {**values, **told}
        named_values = {n if n in named else f"mismatch/{n}": v for n, v in all_values.items()}
        run.show(named_values, begun + 1)
        self._write(begun + 1, values, told)
        self.warning.judge(self._owner, self._log, begun + 1, values, self.causes)

    def _write(self, step: int, values: Mapping[str, float], causes: Mapping[str, float]) -> None:
        """Only rank 0 has a writer."""
        if self._writer is not None:
            try:
                self._writer.append(step, values)
                if causes:
                    shares = {name.removeprefix("cause/"): x for name, x in causes.items()}
                    self._writer.append_causes(step, shares)
            except OSError:
                self._writer = None
                log.exception("mismatch.csv cannot be written; training continues without it")

    def guarded(self, function: Callable[..., object], *args: Any) -> None:
        """What is wrong from the start is raised; what goes wrong later may not end the run."""
        # The end of a step is a collective, in which this rank tells the others that it has failed.
        if self._failed and function != self._end_step:
            return
        try:
            function(*args)
        except Exception:
            if not self.worked:
                raise
            if not self._failed:
                log.exception("%s failed; training continues without it", self._name)
            self._failed = True

    def end(self) -> None:
        """Measure no more."""
        self._run = self._writer = self._owner = None

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The detector's state, and when precision was raised."""
        return {
            "version": STATE_VERSION,
            "measured_at": self._measured_at,
            **self.warning.state_dict(),
        }

    @reads("MismatchMonitor state")
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        state = check_version(state, STATE_VERSION, "MismatchMonitor state")
        self._measured_at = int(state["measured_at"])
        self.warning.load_state_dict(state)
