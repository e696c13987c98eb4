"""CSV files with a row per step: appended to line by line, readable after a crash."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import torch
from torch import Tensor

from lightning_fp.records.one_at_a_time import one_at_a_time
from lightning_fp.records.resume import in_force


class StepRows:
    """Appends rows to a CSV file. One process writes, any number reads.

    Whole lines are appended, so that a crash leaves at most a torn last one, which is not read.
    Where steps go back, as after a resume or a rollback, what follows replaces what was there.

    Args:
        path: the file; its directory is made if it is not there.
        columns: their names, "step" first.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path, self._columns = path, tuple(columns)
        self._header: str | None = None

    def append(self, rows: Iterable[Sequence[float | None]]) -> None:
        """Add rows; they are in the file when this returns. Without a row there is no file.

        Args:
            rows: a value for each column; None leaves it empty.

        Raises:
            OSError: if the disk is full, for example, or the directory read-only.
        """
        lines = [",".join("" if v is None else repr(v) for v in row) + "\n" for row in rows]
        if not lines:
            return
        with one_at_a_time():
            header = self._begin() if self._header is None else self._header
            with self._path.open("a", encoding="ascii") as file:
                file.write("".join([header, *lines]))
            self._header = ""

    def _begin(self) -> str:
        """Make the directory, and cut off what was torn; what the first row needs before it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._path.read_bytes() if self._path.is_file() else b""
        whole = lines.rfind(b"\n") + 1
        if whole < len(lines):
            os.truncate(self._path, whole)
        return "" if whole else ",".join(self._columns) + "\n"


def read_csv(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """All whole lines of a CSV file.

    Args:
        path: the file.
        schema: types of its columns, where nothing but an empty field is null; None guesses.

    Raises:
        pyarrow.ArrowInvalid: if it is no such file.
    """
    lines = path.read_bytes()
    whole = lines[: lines.rfind(b"\n") + 1] or lines
    options = None
    if schema is not None:
        options = pyarrow.csv.ConvertOptions(column_types=schema, null_values=[""])
    return pyarrow.csv.read_csv(pa.BufferReader(whole), convert_options=options)


def table_in_force(table: pa.Table) -> pa.Table:
    """Without the rows that a later one replaces.

    Args:
        table: what `StepRows` wrote, with a column "step".
    """
    return table.filter(pa.array(in_force(numbers(table["step"])).tolist(), pa.bool_()))


def numbers(column: pa.ChunkedArray) -> Tensor:
    """float64; null becomes NaN."""
    return torch.tensor(column.cast(pa.float64()).to_numpy())


def read_step_rows(path: Path, columns: Sequence[str]) -> pa.Table:
    """The rows in force.

    Args:
        path: the file that `StepRows` writes.
        columns: their names, "step" first.

    Returns:
        "step" as int64, the others as float64, null where they are empty; no rows if there is no
        file, or only a torn line in it.

    Raises:
        ValueError: if the file has other columns, or something else than numbers.
    """
    schema = pa.schema({name: pa.int64() if name == "step" else pa.float64() for name in columns})
    if not path.is_file() or b"\n" not in path.read_bytes():
        return schema.empty_table()
    try:
        table = read_csv(path, schema)
        if tuple(table.column_names) != tuple(columns):
            raise ValueError(
                f"{str(path)!r} must have the columns {', '.join(columns)}, got"
                f" {', '.join(table.column_names)}"
            )
        return table_in_force(table)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} cannot be read: {reason}") from error
