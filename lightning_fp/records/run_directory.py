"""Which directory a run writes to: one of its own, where it goes on when it is resumed."""

from __future__ import annotations

from pathlib import Path

from lightning_fp.records.run import FILE


def version_of(base: Path, before: Path | None, *, begins: bool, numbered: bool) -> Path:
    """The base as long as no run is there, afterwards a version below it.

    Args:
        base: the directory that was asked for.
        before: where the run has written so far, as its checkpoint says.
        begins: whether the run begins here.
        numbered: whether the first run has a number too.
    """
    if not begins and before is not None and _goes_on_in(before, base):
        return before
    if not numbered and (not begins or not (base / FILE).exists()):
        return base
    known = [int(p.name[8:]) for p in base.glob("version_*") if p.name[8:].isdecimal()]
    last = max(known, default=-1 if numbered else 0)
    return base / f"version_{last if not begins and known else last + 1}"


def _goes_on_in(before: Path, base: Path) -> bool:
    """Whether a directory of the run is still there, and is the base or a version below it."""
    place = before.absolute()
    return before.is_dir() and base.absolute() in (place, *place.parents)
