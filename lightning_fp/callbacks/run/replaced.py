"""Attributes of Lightning's objects, replaced for a while."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(target: object, **attributes: Any) -> Generator[None, None, None]:
    """Attributes of an instance for a while; those it did not have are gone afterwards."""
    own = vars(target)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)
