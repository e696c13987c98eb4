"""Numbers of things, in words."""

from __future__ import annotations


def counted(number: int, thing: str, things: str = "") -> str:
    """A number with its noun, in the singular or the plural.

    >>> counted(1, "layer"), counted(1234, "layer"), counted(0, "batch", "batches")
    ('1 layer', '1,234 layers', '0 batches')

    Args:
        number: how many.
        thing: one of them.
        things: several of them, if that is not `thing` with an s.
    """
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"
