"""Values that must be one of a few names or large enough, and the one error for each of the two."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import TypeAlias

from lightning_fp.shown import shown

Names: TypeAlias = Collection[str]

_LONGEST = 100
"""Characters of a name that are compared with those there are."""


def check_choice(field: str, value: object, known: Names) -> None:
    """Refuse a value that is none of the names.

    Args:
        field: what the value is for, as the user knows it.
        value: the value.
        known: the names.

    Raises:
        ValueError: see `unknown`.
    """
    if value not in known:
        raise unknown(field, value, known)


def check_at_least(least: float, **values: float | None) -> None:
    """Refuse numbers that are too small.

    >>> check_at_least(1, steps=10, batches=None)

    Args:
        least: the smallest that will do.
        values: by what they are for, as the user knows it; None is not asked.

    Raises:
        ValueError: for the first that is smaller.
    """
    for field, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{field} must be at least {least}, got {value}")


def unknown(
    field: str, value: object, known: Names, *, other: str = "", aliases: Names = ()
) -> ValueError:
    """The error for a name that does not exist.

    >>> str(unknown("backend", "nativ", ("auto", "native")))
    "backend must be one of auto, native, got 'nativ'; did you mean 'native'?"

    Args:
        field: what the value is for, as the user knows it.
        value: the value.
        known: the names there are.
        other: what else would do, after the names.
        aliases: shorter names that would do as well.
    """
    hint = f"; for short: {', '.join(aliases)}" if aliases else ""
    hint += did_you_mean(value, (*known, *aliases))
    return ValueError(f"{field} must be one of {', '.join(known)}{other}, got {shown(value)}{hint}")


def did_you_mean(value: object, known: Names) -> str:
    """What a misspelled name may have meant, to be put after a message; "" if nothing is near."""
    near = nearest(value, known)
    return "" if near is None else f"; did you mean {near!r}?"


def nearest(value: object, known: Names) -> str | None:
    """The known name that is meant most likely by a value; None if none is near."""
    return next(iter(near_names(value, known, 1)), None)


def near_names(value: object, known: Names, most: int, *, cutoff: float = 0.6) -> list[str]:
    """The known names that a value may mean: those that begin with it, then those spelled alike.

    >>> near_names("fp8", ("mxfp8", "fp8-dynamic", "bf16"), 2)
    ['fp8-dynamic', 'mxfp8']

    Args:
        value: what the user wrote.
        known: the names.
        most: how many, at most.
        cutoff: how much alike they must be, 0 to 1.
    """
    text = str(value).lower() if isinstance(value, (str, int, float)) else ""
    text = text[:_LONGEST]
    names = {str(name).lower(): str(name) for name in reversed(tuple(known))}
    begin = [low for low in reversed(names) if len(text) > 1 and low.startswith(text)]
    alike = difflib.get_close_matches(text, names, n=most, cutoff=cutoff)
    return [names[low] for low in dict.fromkeys([*begin, *alike])][:most]
