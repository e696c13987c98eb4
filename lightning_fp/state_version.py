"""The version that every saved state carries; older ones are brought up to date, later refused.

A release that changes what a state has raises its version by one and says, beside the code that
reads it, how the state before becomes the new one:

    @migration("rollout state", since=1)
    def _with_tries(state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "tries": {}}

Migrations follow each other, so one written by any release from 0.1 on can be read by all later
ones. tests/states/ has the states that each release wrote.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lightning_fp.shown import a_kind, shown

Migration = Callable[[dict[str, Any]], dict[str, Any]]
Load = TypeVar("Load", bound=Callable[..., Any])

_MIGRATIONS: dict[tuple[str, int], Migration] = {}

_RESUME = "resume with the lightning_fp version that wrote the checkpoint, or a later one"
_DAMAGED = "it is damaged: resume from another checkpoint"


def migration(of: str, *, since: int) -> Callable[[Migration], Migration]:
    """Registers what makes of a state the one of the next version.

    Args:
        of: whose state it is, as in the messages of `check_version`.
        since: the version that it takes; it returns that of the version after.
    """

    def register(migrate: Migration) -> Migration:
        if (of, since) in _MIGRATIONS:
            raise RuntimeError(f"{of} has two migrations from version {since}")
        _MIGRATIONS[of, since] = migrate
        return migrate

    return register


def check_version(
    state: Mapping[str, Any], version: int, of: str, *, do: str = _RESUME
) -> dict[str, Any]:
    """A state as the current version has it.

    Args:
        state: as it was saved, with its "version".
        version: the current one.
        of: whose it is, e.g. "rollout state".
        do: what to do about one that cannot be read.

    Returns:
        The rest of it, brought up to date where it is older.

    Raises:
        ValueError: if it is of a later version, of none, or of one that nothing leads on from.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"{of} must be a mapping, got {a_kind(state)}; {_DAMAGED}")
    found = state.get("version")
    at = found if isinstance(found, int) and not isinstance(found, bool) else version + 1
    values = {name: value for name, value in state.items() if name != "version"}
    while at < version and (migrate := _MIGRATIONS.get((of, at))):
        values, at = migrate(values), at + 1
    if at != version:
        raise ValueError(f"{of} must have version {version}, got {shown(found)}; {do}")
    return values


def reads(what: str) -> Callable[[Load], Load]:
    """A method that loads a state: of a damaged one it says so, whatever is wrong inside.

    Args:
        what: whose state it is.
    """

    def decorate(load: Load) -> Load:
        @functools.wraps(load)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return load(*args, **kwargs)
            except ValueError as error:
                if what in str(error) or "version" in str(error):
                    raise
                raise ValueError(f"{what}: {_line(error)}") from error
            except KeyError as error:
                raise ValueError(f"{what} must have {error}, got none; {_DAMAGED}") from error
            except (AttributeError, IndexError, OverflowError, RuntimeError, TypeError) as error:
                raise ValueError(f"{what} cannot be read: {_line(error)}; {_DAMAGED}") from error

        return call  # pyright: ignore[reportReturnType]

    return decorate


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
