"""Everything a run has left behind, read once; whatever is missing, empty or cut short."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from torch import Tensor

from lightning_fp.argument_types import checked
from lightning_fp.records import Event, Note, read_events, read_parity
from lightning_fp.records.evaluation import FILE as EVALUATION_FILE
from lightning_fp.records.gradients import FILE as GRADIENTS_FILE
from lightning_fp.records.gradients import GradientRow, read_gradients
from lightning_fp.records.mismatch_rows import FILE as MISMATCH_FILE
from lightning_fp.records.newest_run import newest_run
from lightning_fp.records.resume import in_force, rows_in_force
from lightning_fp.records.run import LayerInfo, RunInfo, read_run
from lightning_fp.records.tables import DIRECTORY, unreadable_parts
from lightning_fp.report.read.digest import Digest, read_digest
from lightning_fp.report.read.steps import Steps, read_columns, read_steps

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRecords:
    """The records of one run; what is not there is None or empty."""

    path: Path
    """The run's directory."""

    name: str
    """What the report calls it."""

    starts: tuple[RunInfo, ...] = ()
    """Each time it started or resumed."""

    events: tuple[Event, ...] = ()
    """Those in force, in the order they were written."""

    steps: Steps | None = None
    statistics: Digest | None = None
    parity: tuple[Mapping[str, Any], ...] = ()
    """Rows of `read_parity`: one per probe and layer."""

    evaluation: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Columns of `eval_gap.csv`."""

    mismatch: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Columns of `mismatch.csv`."""

    gradients: tuple[GradientRow, ...] = ()
    """What FP16Monitor saw."""

    unreadable: tuple[str, ...] = ()
    """What is there and cannot be read, as sentences."""

    baseline: RunRecords | None = None
    """The run in high precision that it is compared with."""

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """As they were when the run first started."""
        return self.starts[0].layers if self.starts else ()

    @property
    def settings(self) -> Mapping[str, Mapping[str, Any]]:
        """Options by class, of the last start."""
        return self.starts[-1].settings if self.starts else {}

    @property
    def last_step(self) -> int:
        """The last step that anything was recorded of."""
        statistics = self.statistics.columns[-1][1] if self.statistics else 0
        steps = self.steps.last if self.steps else 0
        return max(steps, statistics, *(event.step for event in self.events), 0)

    @property
    def finished(self) -> Note | None:
        """What the run said at its end, with its account of steps; None if it has not ended."""
        notes = [event for event in self.events if isinstance(event, Note)]
        ends = [note for note in notes if {"attempted", "useful"} <= note.numbers.keys()]
        return ends[-1] if ends and ends[-1].step >= self.last_step else None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to report."""
        measured = (self.parity, self.evaluation, self.mismatch, self.gradients)
        recorded = any((self.starts, self.events, *measured))
        return not recorded and self.steps is None and self.statistics is None


@checked
def read_records(run_dir: str | Path, *, name: str | None = None) -> RunRecords:
    """Everything a run has left behind, also one that still runs or was killed.

    Args:
        run_dir: the run's directory, or one above, see `newest_run`.
        name: what the report calls it; by default the directory's name.

    Raises:
        ValueError: if there is no such directory, or no record in it.
    """
    path = newest_run(run_dir)
    if not path.is_dir():
        raise ValueError(f"run must be a directory that a run wrote to, got {str(run_dir)!r}")
    unreadable: list[str] = []

    def read(what: str, reader: Callable[[Path], T], missing: T) -> T:
        try:
            return reader(path)
        except FileNotFoundError:
            return missing
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, pa.ArrowException) as error:
            unreadable.append(f"{what} cannot be read: {' '.join(str(error).split())[:200]}")
            return missing

    no_columns: Mapping[str, Tensor] = {}
    starts = tuple(rows_in_force(read("run.jsonl", read_run, []), lambda start: start.step))
    statistics: Digest | None = read("statistics/", read_digest, None)
    if broken := unreadable_parts(path):
        more = f" and {len(broken) - 1} more" if broken[1:] else ""
        unreadable.append(f"{DIRECTORY}/{broken[0]}{more} cannot be read, and is left out")
    if statistics is not None and starts:
        statistics = statistics.in_order([layer.name for layer in starts[0].layers])
    records = RunRecords(
        path=path,
        name=name or path.resolve().name,
        starts=starts,
        events=tuple(read("events.jsonl", read_events, [])),
        steps=read("loss.csv", read_steps, None),
        statistics=statistics,
        parity=tuple(read("parity.jsonl", lambda path: read_parity(path).to_pylist(), [])),
        evaluation=read(EVALUATION_FILE, _csv(EVALUATION_FILE), no_columns),
        mismatch=read(MISMATCH_FILE, _csv(MISMATCH_FILE), no_columns),
        gradients=tuple(read(GRADIENTS_FILE, read_gradients, [])),
        unreadable=tuple(unreadable),
    )
    if records.empty and not unreadable:
        raise ValueError(
            f"no records in {str(run_dir)!r}: it must be the dirpath of ClampMonitor,"
            " PrecisionFallback or another callback that records, by default the run's directory"
        )
    return records


def names_of(run_dirs: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart.

    >>> names_of(["logs/a/version_0", "logs/b/version_0"])
    ['a/version_0', 'b/version_0']

    Args:
        run_dirs: the runs' directories.
    """
    parts = [Path(run_dir).resolve().parts for run_dir in run_dirs]
    longest = max((len(part) for part in parts), default=1)
    for length in range(1, longest + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{part[-1]} ({number})" for number, part in enumerate(parts, start=1)]


def _csv(name: str) -> Callable[[Path], Mapping[str, Tensor]]:
    def read(path: Path) -> Mapping[str, Tensor]:
        columns = read_columns(path / name)
        steps = columns.get("step")
        if steps is None or not len(steps):
            return {}
        counts = in_force(steps)
        return {column: values[counts] for column, values in columns.items()}

    return read
