"""A value in a message: in one line, and short, whatever it is.

A YAML text of ten lines whose aliases name each other ten times has a `repr` of ten gigabytes.
"""

from __future__ import annotations

import reprlib

LONGEST = 80
"""Characters of a value that a message shows."""

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxtuple = 3, 6, 8, 8
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = LONGEST


def shown(value: object) -> str:
    r"""Its `repr`, cut where it is long.

    >>> shown("two\nlines"), shown([[[[[1]]]]])
    ("'two\\nlines'", '[[[[...]]]]')

    Args:
        value: anything, also with a `repr` that fails.
    """
    try:
        text = " ".join(_REPR.repr(value).split())
    except Exception:
        text = a_kind(value)
    return text if len(text) <= 2 * LONGEST else f"{text[: 2 * LONGEST]}..."


def a_kind(value: object) -> str:
    """What a value is, with its article.

    >>> a_kind(3), a_kind("x"), a_kind(ArithmeticError())
    ('an int', 'a str', 'an ArithmeticError')

    Args:
        value: anything.
    """
    name = type(value).__name__
    spelt = name[:2].isupper() and name[0] in "FHLMNRSX"  # L sounds like "el"
    return f"{'an' if spelt or name[0] in 'AEIOaeio' else 'a'} {name}"
