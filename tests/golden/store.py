"""The traces that were recorded, one file each, with what their bits depend on."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tests.golden.traces import differences, fingerprint, to_json

TRACES = Path(__file__).parent / "traces"

MOST = 20
"""Differences that are told; more say no more."""

_this_machine = cache(fingerprint)


def write(name: str, trace: dict[str, Any], directory: Path = TRACES) -> None:
    """Record a trace."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {"machine": _this_machine(), **trace}
    (directory / f"{name}.json").write_text(to_json(content))


def read(name: str, directory: Path = TRACES) -> dict[str, Any]:
    """A trace as it was recorded, with its machine."""
    return json.loads((directory / f"{name}.json").read_text())


def not_comparable(name: str, directory: Path = TRACES) -> str:
    """Why a trace says nothing about this machine; empty if it does."""
    if not (directory / f"{name}.json").exists():
        return f"no trace in {directory}: python -m tests.golden record --only {name}"
    machine = read(name, directory)["machine"]
    other = list(differences(machine, _this_machine()))
    if not other:
        return ""
    return (
        f"recorded on another machine ({'; '.join(other)}), where other bits are right. To compare"
        " two revisions on this one: at the earlier, `python -m tests.golden record --traces"
        " DIRECTORY`, at the later, `python -m tests.golden check --traces DIRECTORY`"
    )


def check(name: str, trace: dict[str, Any], directory: Path = TRACES) -> str:
    """How a trace differs from the recorded one, a line each; empty if it does not."""
    recorded = read(name, directory)
    del recorded["machine"]
    found = list(differences(recorded, trace))
    more = [f"and {len(found) - MOST} more"] if len(found) > MOST else []
    return "\n  ".join([f"{len(found)} differences", *found[:MOST], *more]) if found else ""
