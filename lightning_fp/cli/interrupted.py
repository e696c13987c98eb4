"""What is left of a command that Ctrl-C has ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SHOWN = 6


def kept(options: Mapping[str, Any], started: float) -> str:
    """A clause about the files that a command has written so far.

    Args:
        options: the command's; `output` or `dir` is where it writes, if it writes.
        started: when it began, in seconds since the epoch.
    """
    output = options.get("output", options.get("dir"))
    if output is None:
        return "nothing was written"
    place = Path(output)
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    new = [str(file.relative_to(place.parent)) for file in files if _written_since(file, started)]
    if not new:
        return f"nothing was written to {output}"
    more = f" and {len(new) - _SHOWN} more" if len(new) > _SHOWN else ""
    return f"kept in {place.parent}: {', '.join(new[:_SHOWN])}{more}"


def _written_since(file: Path, started: float) -> bool:
    return file.stat().st_mtime >= int(started)  # some file systems keep whole seconds
