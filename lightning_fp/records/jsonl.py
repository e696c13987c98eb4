"""Files of JSON lines: appended to in one write each, readable also after the run was killed.

JSON has no numbers for inf and NaN, and strict readers refuse Python's. Lines have their names
instead, which `float()` turns back; where only people and tools look they are null.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning_fp.records.one_at_a_time import one_at_a_time

T = TypeVar("T")

log = logging.getLogger(__name__)


def plain(value: Any, *, names: bool = False) -> Any:
    """The same without inf and NaN, which JSON does not know.

    >>> plain({"loss": [1.5, float("nan")]}), plain({"loss": -float("inf")}, names=True)
    ({'loss': [1.5, None]}, {'loss': '-inf'})

    Args:
        value: mappings, lists and tuples of anything.
        names: "inf", "-inf" and "nan" stand for them instead of None.
    """
    if isinstance(value, Mapping):
        return {key: plain(entry, names=names) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry, names=names) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value) if names else None
    return value


def json_text(value: Any) -> str:
    """As JSON for people and tools, null for what is not finite."""
    return json.dumps(plain(value), indent=2, allow_nan=False)


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Add a line; it is with the operating system when this returns.

    Args:
        path: the file; its directory is made if it is not there.
        values: what JSON does not know is written as text.

    Raises:
        OSError: if the disk is full, for example.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(values, names=True), allow_nan=False, default=str)
    line = text.encode() + b"\n"
    # Opened anew each time: lines are rare, and so nothing is left to close or to pickle.
    with one_at_a_time(), path.open("a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # what was cut short must not spoil this line too
                line = b"\n" + line
        if (written := file.write(line)) != len(line):
            raise OSError(f"wrote {written} of {len(line)} bytes to {str(path)!r}")


def read_lines(path: Path, make: Callable[[dict[str, Any]], T]) -> list[tuple[int, T]]:
    """Every line that can be read; the others are left out with a warning.

    Args:
        path: the file; one that is not there has no lines.
        make: makes of a line's values what is returned of it.

    Returns:
        The position in bytes at which each line begins, and what was made of it.
    """
    made: list[tuple[int, T]] = []
    position = 0
    content = path.read_bytes() if path.is_file() else b""
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("its end is missing")  # still being written, or cut short
            if line.strip():
                made.append((position, make(json.loads(line))))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            log.warning("line %d of %s is left out: %s", number, path, error)
        position += len(line)
    return made


def step_of(values: Mapping[str, Any]) -> int:
    """The step of a line.

    Raises:
        KeyError: if it has none.
        TypeError: if that is no number of steps.
    """
    step = values["step"]
    if not isinstance(step, int) or isinstance(step, bool) or abs(step) >= 2**53:
        raise TypeError("step must be a whole number")
    return step
