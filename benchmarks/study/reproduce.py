"""What papers found about formats and stability, run again in small.

    python benchmarks/study/reproduce.py --minutes 120

Each point is a sweep of its own over the tiny GPT, the smallest useful part first; the same command
goes on where it was stopped, `--minutes 0` writes the page's tables from what there is. What agrees
with the papers and what does not is said on the page, by hand, from these tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.study.pages import put, rate  # noqa: E402
from benchmarks.study.running import Clock, Row, rows  # noqa: E402
from lightning_fp.study.sweep.findings import FormatFindings, failed, find, loss_limit  # noqa: E402

STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Point:
    """One thing that a paper has found."""

    name: str
    formats: tuple[str, ...]
    lrs: tuple[float, ...]
    seeds: int
    net: str = "gpt"
    axes: dict[str, list[Any]] = field(default_factory=dict)


MANTISSAS = ("e8m7", "e8m5", "e8m4", "e8m3")
"""The first, rounded to nearest, is bf16 itself."""

POINTS = (
    # arXiv 2405.18710: mantissa bits are cleared, at the usual learning rate and beyond it
    Point(
        name="mantissa",
        formats=("bf16", *(f"{name}-truncate" for name in MANTISSAS), *MANTISSAS[1:]),
        lrs=(1e-3, 3e-3, 1e-2),
        seeds=5,
    ),
    # the same: E7M7 does not train, since large values are lost
    Point(
        name="exponent",
        formats=("bf16", "e7m7", "e6m7", "e5m7", "e4m7"),
        lrs=(1e-3, 1e-2),
        seeds=3,
    ),
    # reports on pretraining with NVFP4: high precision for the last tenth closes the gap
    Point(
        name="cooldown",
        formats=("bf16", "fp8-dynamic", "e8m3-truncate"),
        lrs=(1e-3,),
        seeds=5,
        axes={"recipe": [False, "bf16-cooldown"]},
    ),
    # arXiv 2409.12517: outliers that grow are what delayed scaling fails by
    Point(
        name="outliers",
        formats=("bf16", "fp8-dynamic", "fp8-delayed"),
        lrs=(1e-3,),
        seeds=3,
        net="growing",
        axes={"bits": [0, 0.05, 0.2, 0.5]},
    ),
)


def measure(point: Point, directory: Path, clock: Clock) -> list[Row]:
    """Seed by seed, so that all settings grow alike."""
    found: list[Row] = []
    for seeds in range(1, point.seeds + 1):
        found = rows(
            point.net,
            directory / point.name,
            clock,
            formats=point.formats,
            lrs=point.lrs,
            seeds=range(seeds),
            steps=STEPS,
            axes=point.axes,
        )
    return found


def table(found: Sequence[Row]) -> str:
    """A line for each setting, format and learning rate."""
    if not found:
        return "Not run yet.\n"
    text = (
        "| format | lr | failed | diverged | spikes per 1,000 steps | final loss | gap to BF16 |\n"
    )
    text += "|---" * 7 + "|\n"
    for each in find(found, STEPS).formats:
        text += "".join(_line(each, index) for index in range(len(each.rates)))
    return text


def _line(each: FormatFindings, index: int) -> str:
    at = each.rates[index]
    name = f"`{each.format}`" + (f", {each.setting}" if each.setting else "")
    cells = [
        name,
        f"{at.lr:g}",
        rate(at.failed, at.runs),
        str(at.diverged),
        f"{at.spikes:.1f}",
        "not finite" if at.final_loss is None else f"{at.final_loss:.3f}",
        "" if at.gap is None or each.format == "bf16" else f"{at.gap:+.2%}",
    ]
    return f"| {' | '.join(cells)} |\n"


def compared(found: Sequence[Row]) -> dict[str, Any]:
    """How many runs failed, of all formats beside BF16, by the rule of the sweep."""
    high = [row for row in found if row["format"] == "bf16"]
    limit = loss_limit(high)
    others = [row for row in found if row["format"] != "bf16"]
    return {
        "bf16": [sum(failed(row, limit) for row in high), len(high)],
        "others": [sum(failed(row, limit) for row in others), len(others)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120)
    names = [point.name for point in POINTS]
    parser.add_argument("--points", nargs="*", default=names, choices=names)
    parser.add_argument("--dir", type=Path, default=ROOT / "runs" / "reproduction")
    parser.add_argument("--no-docs", action="store_true", help="print the tables only")
    options = parser.parse_args()
    clock = Clock(60 * options.minutes)
    result: dict[str, Any] = {
        "command": "python benchmarks/study/reproduce.py",
        "date": date.today().isoformat(),
        "points": {},
    }
    for point in POINTS:
        if point.name not in options.points:
            continue
        found = measure(point, options.dir, clock)
        print(f"\n{point.name}\n{table(found)}", flush=True)
        told = [asdict(each) for each in find(found, STEPS).formats]
        result["points"][point.name] = {**compared(found), "formats": told}
        if not options.no_docs:
            put(ROOT / "docs" / "stability-reproduction.md", point.name, table(found))
    if not options.no_docs:
        path = ROOT / "benchmarks" / "results" / "reproduction.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
