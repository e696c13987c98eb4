"""How far apart training and rollout were in a run, what that came from, and what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_fp.cli.output import console, print_json
from lightning_fp.records import read_mismatch, read_mismatch_causes
from lightning_fp.records.mismatch_rows import CAUSES
from lightning_fp.rl.causes import REMEDIES
from lightning_fp.terminal import FittedTable

_PARTS = 3
"""A run is shown in so many parts of equal length: a mismatch that grows shows in the last."""

_REMEDIES: dict[str, str] = {str(name): remedy for name, remedy in REMEDIES.items()}

_SHOWN = {"E|r|": "logprob_abs_diff_mean", "k3": "k3_kl"}


def is_run(path: str) -> bool:
    """Whether a path is a directory, and so no factory."""
    return Path(path).is_dir()


# `json` is the name of the option.
def run(run: str, *, json: bool) -> int:
    """Print the mismatch of a run with its causes; see `commands.mismatch`.

    Raises:
        ValueError: if the run has measured none.
    """
    parts = parts_of(read_mismatch(run), read_mismatch_causes(run))
    if not parts:
        raise ValueError(
            f"{run!r} has measured no mismatch: train with MismatchMonitor, or call"
            " loop.mismatch.update(...)"
        )
    if json:
        print_json({"run": run, "parts": [_plain(part) for part in parts]})
    else:
        _print(parts)
    return 0


@dataclass(frozen=True, kw_only=True)
class RunPart:
    """Some steps of a run; means over them."""

    first: int
    last: int
    """Steps."""

    values: dict[str, float]
    """By the names in `mismatch.csv`."""

    shares: dict[str, float]
    """Of k3, by cause; empty where nothing was told apart."""

    @property
    def main(self) -> str | None:
        """The cause with the largest share."""
        return max(self.shares, key=lambda name: self.shares[name], default=None)


def parts_of(mismatch: pa.Table, causes: pa.Table) -> list[RunPart]:
    """A run in parts.

    Args:
        mismatch: as `read_mismatch` returns it.
        causes: as `read_mismatch_causes` returns it.
    """
    rows: list[dict[str, Any]] = mismatch.to_pylist()
    told = {row["step"]: row for row in causes.to_pylist()}
    length = -(-len(rows) // _PARTS)
    parts: list[RunPart] = []
    for start in range(0, len(rows), length or 1):
        members = rows[start : start + length]
        origins = [told[row["step"]] for row in members if row["step"] in told]
        shares = {name: _mean([row[name] for row in origins]) for name in CAUSES}
        parts.append(
            RunPart(
                first=members[0]["step"],
                last=members[-1]["step"],
                values={name: _mean([row[name] for row in members]) for name in _SHOWN.values()},
                shares={name: share for name, share in shares.items() if not math.isnan(share)},
            )
        )
    return parts


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _print(parts: list[RunPart]) -> None:
    titles = [f"steps {part.first}-{part.last}" for part in parts]
    grid = FittedTable("", "", *titles, right=titles)
    for title, name in _SHOWN.items():
        grid.add_row(title, *(f"{part.values[name]:.2e}" for part in parts))
    for cause in CAUSES:
        if any(cause in part.shares for part in parts):
            shares = (part.shares.get(cause) for part in parts)
            grid.add_row(f"of k3: {cause}", *("" if s is None else f"{s:.0%}" for s in shares))
    screen = console()
    screen.print(grid)
    for line in _advice(parts[-1]):
        screen.print(line, markup=False, soft_wrap=True)


def _advice(last: RunPart) -> list[str]:
    main = last.main
    if main is None:
        return [
            "causes were not told apart: give a SampleOrigin, update(..., origin=...), with the"
            " versions of the weights and the experts"
        ]
    return [f"at the end mostly {main}: {_REMEDIES[main]}"]


def _plain(part: RunPart) -> dict[str, Any]:
    main = part.main
    return {
        "first": part.first,
        "last": part.last,
        **part.values,
        "shares": part.shares,
        "main": main,
        "remedy": None if main is None else _REMEDIES[main],
    }
