"""One way to talk to a database: Python's own SQLite, or any other through SQLAlchemy.

Statements are plain SQL with `:name` for values, which both take as they are. A transaction is
serialised where the database can (`BEGIN IMMEDIATE` in SQLite); what must be atomic everywhere is a
single UPDATE whose WHERE says what it expects.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeAlias

Row: TypeAlias = tuple[Any, ...]

_BUSY_SECONDS = 120.0
"""How long to wait for others to let go of a SQLite file; they hold it for milliseconds."""

_SQLITE = "sqlite:///"


class Transaction(Protocol):
    """What is done between begin and commit."""

    def rows(self, sql: str, values: Mapping[str, Any] | None = None) -> list[Row]:
        """What a SELECT finds."""
        ...

    def change(self, sql: str, values: Mapping[str, Any] | None = None) -> int:
        """How many rows a statement has changed."""
        ...


class Database(Protocol):
    """Where the table of cells is."""

    where: str
    """For messages."""

    clashes: tuple[type[Exception], ...]
    """What it raises where two transactions have added the same row."""

    def transaction(self) -> Any:
        """A context whose value is a `Transaction`; an exception undoes what was done in it."""
        ...


def open_database(url: str | None, directory: Path) -> Database:
    """The database of a sweep.

    Args:
        url: of SQLAlchemy, e.g. "postgresql+psycopg://host/name"; None is a file in the directory.
        directory: of the sweep.

    Raises:
        ValueError: for a URL that SQLAlchemy does not know.
        ImportError: where SQLAlchemy is asked for and not installed.
    """
    if url is None:
        return SQLite(directory / "cells.sqlite")
    if url.startswith(_SQLITE):
        return SQLite(Path(url.removeprefix(_SQLITE)))
    return Other(url)


class SQLite:
    """A file, and nothing to install.

    Args:
        path: of the file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where = str(path)
        self.clashes: tuple[type[Exception], ...] = (sqlite3.IntegrityError,)

    @contextmanager
    def transaction(self) -> Generator[Transaction, None, None]:
        """See `Database.transaction`."""
        # Opened anew each time: so threads share nothing, and a fork inherits nothing.
        connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield _SQLiteTransaction(connection)
            except BaseException:
                connection.rollback()
                raise
            connection.execute("COMMIT")
        finally:
            connection.close()


class _SQLiteTransaction:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def rows(self, sql: str, values: Mapping[str, Any] | None = None) -> list[Row]:
        return self._connection.execute(sql, dict(values or {})).fetchall()

    def change(self, sql: str, values: Mapping[str, Any] | None = None) -> int:
        return self._connection.execute(sql, dict(values or {})).rowcount


class Other:
    """Whatever SQLAlchemy knows.

    Args:
        url: its URL.
    """

    def __init__(self, url: str) -> None:
        try:
            alchemy = import_module("sqlalchemy")
        except ImportError as error:
            raise ImportError(
                "a --storage URL needs SQLAlchemy: pip install 'lightning-fp[storage]'"
            ) from error
        try:
            self._engine: Any = alchemy.create_engine(url, pool_pre_ping=True)
        except (alchemy.exc.ArgumentError, alchemy.exc.NoSuchModuleError, ImportError) as error:
            raise ValueError(
                f"--storage must be a URL that SQLAlchemy can open: {_line(error)}"
            ) from error
        self._text: Any = alchemy.text
        # Two that make the same table at once clash too, in words that differ by database.
        errors = alchemy.exc
        self.clashes: tuple[type[Exception], ...] = (errors.IntegrityError, errors.ProgrammingError)
        self.where = str(self._engine.url)  # without the password

    @contextmanager
    def transaction(self) -> Generator[Transaction, None, None]:
        """See `Database.transaction`."""
        with self._engine.begin() as connection:
            yield _OtherTransaction(connection, self._text)


class _OtherTransaction:
    def __init__(self, connection: Any, text: Any) -> None:
        self._connection, self._text = connection, text

    def rows(self, sql: str, values: Mapping[str, Any] | None = None) -> list[Row]:
        found: Sequence[Any] = self._connection.execute(self._text(sql), dict(values or {})).all()
        return [tuple(row) for row in found]

    def change(self, sql: str, values: Mapping[str, Any] | None = None) -> int:
        return int(self._connection.execute(self._text(sql), dict(values or {})).rowcount)


def database_errors() -> tuple[type[Exception], ...]:
    """What a database raises that is full, gone or locked."""
    try:
        alchemy = import_module("sqlalchemy.exc")
    except ImportError:
        return (sqlite3.Error,)
    return (sqlite3.Error, alchemy.SQLAlchemyError)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
