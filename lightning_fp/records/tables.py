"""Per-layer statistics over time, as Parquet parts that survive a crash.

A part is written under a temporary name and renamed, so that every part there is can be read.
Small parts are merged geometrically: n flushes leave O(log n) parts, and each row is written
O(log n) times.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_fp.argument_types import checked
from lightning_fp.records.newest_run import newest_run
from lightning_fp.records.one_at_a_time import one_at_a_time

log = logging.getLogger(__name__)

DIRECTORY = "statistics"
"""Name of the directory inside of a run's."""

_TEXT = pa.dictionary(pa.int32(), pa.string())

SCHEMA = pa.schema(
    {
        "step": pa.int64(),
        "layer": _TEXT,
        "operand": _TEXT,
        "format": _TEXT,
        "sampled": pa.bool_(),
        "sampled_at": _TEXT,
        "sampled_steps": pa.int32(),
        "amax": pa.float32(),
        "scale": pa.float32(),
        "headroom_bits": pa.float32(),
        "nonfinite": pa.int64(),
        "clamped_fraction": pa.float32(),
        "clamped_mass": pa.float32(),
        "underflow_fraction": pa.float32(),
        "sqnr_db": pa.float32(),
        "clamp_sqnr_db": pa.float32(),
        "scale_spread_bits": pa.float32(),
        "flops": pa.float32(),
        "padding_fraction": pa.float32(),
        "numel": pa.int64(),
        "nonzero": pa.int64(),
        "magnitude": pa.float32(),
        "signal": pa.float32(),
        "what_if_delayed_clamped_fraction": pa.float32(),
        "what_if_delayed_clamped_mass": pa.float32(),
        "what_if_delayed_underflow_fraction": pa.float32(),
        "what_if_dynamic_underflow_fraction": pa.float32(),
        "what_if_rowwise_underflow_fraction": pa.float32(),
        "what_if_block_underflow_fraction": pa.float32(),
        "what_if_other_underflow_fraction": pa.float32(),
    }
)
"""The columns; docs/reading-the-clamp-log.md says what each means and how it combines."""

_MERGE = 8
"""Parts of one size that become one part of the next."""

_LARGEST = 2**17
"""Rows of a part that is not merged any more; merging takes 0.2 s then, once in 131,072 rows."""


_ATTEMPTS = 20


@dataclass(frozen=True)
class _Part:
    """One file: what its name and its footer say."""

    path: Path
    number: int
    last: int
    """The last number merged into it; its own if none was."""
    session: int
    """Counts the times that a writer was opened in this directory."""
    resumed_at: int
    """The step at which that session began: later rows of earlier sessions are void."""
    rows: int
    columns: frozenset[str]


class TableWriter:
    """Appends rows to Parquet parts in a directory of a run. One process writes, any number reads.

    Args:
        run_dir: the run's directory; made if it is not there.
        name: of the directory inside of it.
        schema: the columns, "step" among them.
        step: the step the run begins or resumes at. Rows that an earlier, abandoned continuation
            of the run has written for later steps stay on disk and are no longer read.
        rows_per_part: rows that are held back before a part is written.
        seconds: rows are held back only if they come within this time of the last part.
    """

    def __init__(
        self,
        run_dir: Path,
        name: str,
        schema: pa.Schema,
        *,
        step: int = 0,
        rows_per_part: int = 8192,
        seconds: float = 10.0,
    ) -> None:
        self._schema = schema
        self._directory = Path(run_dir) / name
        self._directory.mkdir(parents=True, exist_ok=True)
        for leftover in self._directory.glob(".part-*.tmp"):
            leftover.unlink()
        parts = _parts(self._directory)
        taken = [_number(path) for path in self._directory.glob("part-*.parquet")]
        self._number = 1 + max([*taken, *(part.last for part in parts)], default=-1)
        self._session = max((part.session for part in parts), default=-1)
        self._rows_per_part, self._seconds = rows_per_part, seconds
        self._buffer: list[pa.Table] = []
        self._flushed = time.monotonic()
        self._process = os.getpid()
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Go on from an earlier step: rows written so far for later ones are no longer read."""
        self.flush()
        self._session += 1
        self._step = step
        self._levels: dict[int, list[_Part]] = {}

    def append(self, columns: Mapping[str, Any]) -> None:
        """Add rows; they are on disk after the next flush.

        Args:
            columns: as many of the schema's as there are, all of one length; NaN stands for null.
        """
        fields = [field for field in self._schema if field.name in columns]
        arrays = [_array(columns[field.name], field.type) for field in fields]
        table = pa.Table.from_arrays(arrays, schema=pa.schema(fields))
        with one_at_a_time():
            self._buffer.append(table)
            many = sum(table.num_rows for table in self._buffer) >= self._rows_per_part
            if many or time.monotonic() - self._flushed >= self._seconds:
                self.flush()

    def flush(self) -> None:
        """Write what is held back as a part, and merge parts where there are enough.

        A copy in a forked process writes nothing: its rows are the other's, which goes on.
        """
        with one_at_a_time():
            if self._buffer and self._process == os.getpid():
                self._flush()

    def _flush(self) -> None:
        table = _concat(self._buffer)
        self._buffer.clear()
        self._flushed = time.monotonic()
        part = self._write(table, self._number, self._number)
        self._number += 1
        level = 0
        while True:
            peers = self._levels.setdefault(level, [])
            peers.append(part)
            if len(peers) < _MERGE or part.rows * _MERGE > _LARGEST:
                return
            self._levels[level] = []
            part = self._merge(peers)
            level += 1

    def _merge(self, parts: list[_Part]) -> _Part:
        """One part for many; under the name of the first, which covers the others' numbers."""
        table = _concat([pq.read_table(part.path) for part in parts])
        merged = self._write(table, parts[0].number, parts[-1].last)
        for part in parts[1:]:
            part.path.unlink()
        return merged

    def _write(self, table: pa.Table, number: int, last: int) -> _Part:
        path = self._directory / f"part-{number:06d}.parquet"
        footer = {"last": last, "session": self._session, "resumed_at": self._step}
        text = {f"lightning_fp.{key}": str(value) for key, value in footer.items()}
        temporary = path.with_name(f".{path.name}.tmp")
        pq.write_table(table.replace_schema_metadata(text), temporary, compression="zstd")
        os.replace(temporary, path)
        columns = frozenset(table.column_names)
        return _Part(path=path, number=number, rows=table.num_rows, columns=columns, **footer)


class StatisticsWriter(TableWriter):
    """Appends rows to `<run_dir>/statistics/`; see `TableWriter`."""

    def __init__(
        self, run_dir: Path, *, step: int = 0, rows_per_part: int = 8192, seconds: float = 10.0
    ) -> None:
        super().__init__(
            run_dir, DIRECTORY, SCHEMA, step=step, rows_per_part=rows_per_part, seconds=seconds
        )


@checked
def read_statistics(
    run_dir: str | Path,
    *,
    columns: Sequence[str] | None = None,
    filters: pc.Expression | None = None,
) -> pa.Table:
    """The statistics of a run, also of one that is still being written or was killed.

    Args:
        run_dir: the directory that the run wrote to.
        columns: which columns to read; all by default.
        filters: which rows to read, e.g. `pc.field("layer") == "blocks.0.fc1"`: the way to look
            at a run whose table would not fit into memory.

    Returns:
        One row per step of logging, layer, operand and format, in the order they were written.

    Raises:
        FileNotFoundError: if the run has written none.
    """
    directory = newest_run(run_dir) / DIRECTORY
    if not directory.is_dir():
        raise FileNotFoundError(
            f"no statistics in {str(run_dir)!r}: run_dir must be a directory that ClampMonitor"
            " wrote to (its dirpath, by default the run's directory)"
        )
    return read_parts(directory, SCHEMA, columns=columns, filters=filters)


def read_parts(
    directory: Path,
    schema: pa.Schema,
    *,
    columns: Sequence[str] | None = None,
    filters: pc.Expression | None = None,
) -> pa.Table:
    """The rows in force of a table that a `TableWriter` writes, or has written.

    Args:
        directory: where its parts are.
        schema: the columns.
        columns: which of them to read; all by default.
        filters: which rows to read.
    """
    for attempt in range(_ATTEMPTS):
        try:
            parts = _parts(directory, warn=attempt == 0)
            table = _read(parts, schema, columns, filters)
            if _parts(directory)[: len(parts)] == parts:
                return table
        except FileNotFoundError:
            pass
        # The writer has merged parts in between, so that rows could be missing or here twice.
        time.sleep(0.01 * attempt)
    raise RuntimeError(f"{str(directory)!r} changes faster than it can be read; try again")


def unreadable_parts(run_dir: str | Path) -> list[str]:
    """The names of the files that `read_statistics` leaves out, because they are no statistics."""
    directory = newest_run(run_dir) / DIRECTORY
    files = sorted(directory.glob("part-*.parquet"))  # before the rest: a writer may go on
    parts = [
        part for part in _parts(directory) if _rows_of(part.path, sorted(part.columns)) is not None
    ]
    taken_in = {number for part in parts for number in range(part.number, part.last + 1)}
    return [path.name for path in files if _number(path) not in taken_in]


def _read(
    parts: Sequence[_Part],
    schema: pa.Schema,
    columns: Sequence[str] | None,
    filters: pc.Expression | None,
) -> pa.Table:
    resumed = {part.session: part.resumed_at for part in parts}
    tables = [schema.empty_table().select(columns or schema.names)]
    for part in parts:
        # Later sessions that resumed before this one's end have replaced what follows.
        later = [step for session, step in resumed.items() if session > part.session]
        wanted = filters
        if later:
            valid = pc.field("step") <= min(later)
            wanted = valid if filters is None else filters & valid
        names = part.columns if columns is None else part.columns & {"step", *columns}
        table = _rows_of(part.path, sorted(names), wanted)
        if table is not None:
            tables.append(table)
    return _concat(tables).select(columns or schema.names)


def _rows_of(
    path: Path, columns: list[str], filters: pc.Expression | None = None
) -> pa.Table | None:
    """The rows of a part; None, with a warning, if its pages are damaged."""
    try:
        return pq.read_table(path, columns=columns, filters=filters)
    except FileNotFoundError:
        raise  # the writer has merged it in between
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        log.warning("%s cannot be read and is left out: %s", path, reason)
        return None


def _parts(directory: Path, *, warn: bool = False) -> list[_Part]:
    """The parts in force, in order; a part that another has taken in is left out."""
    parts: list[_Part] = []
    for path in sorted(directory.glob("part-*.parquet")):
        number = _number(path)
        if parts and number <= parts[-1].last:
            continue
        try:
            metadata = pq.read_metadata(path)
            footer: dict[bytes, bytes] = metadata.metadata or {}
            part = _Part(
                path=path,
                number=number,
                last=int(footer[b"lightning_fp.last"]),
                session=int(footer[b"lightning_fp.session"]),
                resumed_at=int(footer[b"lightning_fp.resumed_at"]),
                rows=metadata.num_rows,
                columns=frozenset(metadata.schema.to_arrow_schema().names),
            )
        except FileNotFoundError:
            raise  # the writer has merged it in between
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            if warn:
                log.warning("%s cannot be read and is left out: %s", path, error)
            continue
        parts.append(part)
    return parts


def _number(path: Path) -> int:
    digits = path.stem.removeprefix("part-")
    return int(digits) if digits.isdecimal() else -1  # somebody else's


def _concat(tables: Sequence[pa.Table]) -> pa.Table:
    """One table with one chunk and one dictionary per column; missing columns are null."""
    plain = [table.replace_schema_metadata(None) for table in tables]
    return pa.concat_tables(plain, promote_options="default").unify_dictionaries().combine_chunks()


def _array(values: Any, type: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(type):
        return pa.array(values, pa.string()).dictionary_encode()
    return pa.array(values, from_pandas=True).cast(type)
