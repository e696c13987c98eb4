"""Runs that fail by themselves: what each arm saves of them, and what it costs.

    python benchmarks/study/thesis.py --minutes 90

No fault is planted. A first sweep over formats and learning rates finds the settings at which a
format fails in 20 to 80% of the runs; there every arm runs on seeds that the first sweep has not
seen. The same command goes on where it was stopped, `--minutes 0` writes table and plot from what
there is. A run has failed as in `lightning-fp study sweep`, by the reference BF16.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.proof.arms import RIVALS, Arm  # noqa: E402
from benchmarks.study.pages import put, rate  # noqa: E402
from benchmarks.study.running import Clock, Row, rows  # noqa: E402
from lightning_fp.study.sweep.findings import failed, loss_limit  # noqa: E402

STEPS = {"gpt": 200, "llama": 200}
FORMATS = ("e8m3-truncate", "e8m3", "fp8-delayed", "fp8-dynamic")
LRS = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
SCAN_SEEDS = range(3)
FRESH = 100
"""The first of the seeds that arms are compared on."""

SOMETIMES = (0.2, 0.8)
ARMS: tuple[Arm, ...] = (*RIVALS, "fallback")
MOST_RUNS = 600


def scan(directory: Path, clock: Clock) -> dict[str, list[Row]]:
    """Every format at every rate, a few seeds."""
    return {
        net: rows(
            net,
            directory / f"scan-{net}",
            clock,
            formats=("bf16", *FORMATS),
            lrs=LRS,
            seeds=SCAN_SEEDS,
            steps=steps,
            axes={"arm": ["unprotected"]},
        )
        for net, steps in STEPS.items()
    }


def undecided(found: dict[str, list[Row]]) -> list[tuple[str, str, float]]:
    """Net, format and rate of which some runs fail and some do not, and BF16's no more often."""
    cells: list[tuple[str, str, float]] = []
    for net, of_net in found.items():
        limit = loss_limit([row for row in of_net if row["format"] == "bf16"])
        shares: dict[tuple[str, float], float] = {}
        for format in ("bf16", *FORMATS):
            for lr in LRS:
                runs = [r for r in of_net if r["format"] == format and r["lr"] == lr]
                if len(runs) == len(SCAN_SEEDS):
                    shares[format, lr] = sum(failed(r, limit) for r in runs) / len(runs)
        for (format, lr), share in shares.items():
            low, high = SOMETIMES
            if format != "bf16" and low <= share <= high and shares.get(("bf16", lr), 1) <= share:
                cells.append((net, format, lr))
    return cells


def compare(directory: Path, clock: Clock, found: dict[str, list[Row]], seeds: int) -> list[Row]:
    """Every arm on fresh seeds at the rates at which the format fails now and then."""
    cells = undecided(found)
    most = max(1, (MOST_RUNS - sum(map(len, found.values()))) // max(1, len(cells) * 6))
    told: list[Row] = []
    for count in range(1, min(seeds, most) + 1):  # seed by seed: all cells grow alike
        told = []
        for net, format, lr in cells:
            common: dict[str, Any] = {"lrs": [lr], "steps": STEPS[net]}
            common["seeds"] = range(FRESH, FRESH + count)
            place = directory / f"arms-{net}"
            high = rows(
                net, place, clock, formats=["bf16"], axes={"arm": ["unprotected"]}, **common
            )
            low = rows(net, place, clock, formats=[format], axes={"arm": list(ARMS)}, **common)
            told += [{"net": net, "cell": format, **row} for row in (*high, *low)]
    return told


def summary(found: dict[str, list[Row]], told: list[Row]) -> list[dict[str, Any]]:
    """A line for each cell and arm."""
    lines: list[dict[str, Any]] = []
    for net, format, lr in undecided(found):
        limit = loss_limit([row for row in found[net] if row["format"] == "bf16"])
        here = [r for r in told if (r["net"], r["cell"], r["lr"]) == (net, format, lr)]
        high = {r["seed"]: r for r in here if r["format"] == "bf16"}
        plain = {r["seed"]: r for r in here if r["format"] == format and r["arm"] == "unprotected"}
        arms = {"bf16": high} | {
            arm: {r["seed"]: r for r in here if r["format"] == format and r["arm"] == arm}
            for arm in ARMS
        }
        for arm, runs in arms.items():
            if not runs:
                continue
            lost = [
                (plain[s]["final_loss"] - r["final_loss"])
                / (plain[s]["final_loss"] - high[s]["final_loss"])
                for s, r in runs.items()
                if s in plain
                and s in high
                and failed(plain[s], limit)
                and not failed(high[s], limit)
                and None not in (r["final_loss"], plain[s]["final_loss"])
            ]
            fine = [r for s, r in runs.items() if s in plain and not failed(plain[s], limit)]
            steps = sum(r["steps"] for r in runs.values())
            lines.append(
                {
                    "net": net,
                    "format": format,
                    "lr": lr,
                    "arm": arm,
                    "failed": sum(failed(r, limit) for r in runs.values()),
                    "runs": len(runs),
                    "recovered": median(lost) if lost else None,
                    "needless": sum(r["kept"] < 1 for r in fine),
                    "fine": len(fine),
                    "kept": sum(r["kept"] for r in runs.values()) / len(runs),
                    "replayed": sum(r["replayed"] for r in runs.values()) / steps,
                    "rolled_back": sum(r["rolled_back"] for r in runs.values()) / steps,
                }
            )
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """For the page."""
    head = (
        "| net | format | lr | arm | failed | recovered | demoted, where nothing failed |"
        " left in its format | replayed | rolled back |\n" + "|---" * 10 + "|\n"
    )
    text = head
    for each in lines:
        high = each["arm"] == "bf16"
        recovered = "" if each["recovered"] is None or high else f"{each['recovered']:.0%}"
        needless = "" if high else f"{each['needless']} of {each['fine']}"
        cells = [
            each["net"],
            f"`{each['format']}`",
            f"{each['lr']:g}",
            "BF16" if high else each["arm"],
            rate(each["failed"], each["runs"]),
            "" if each["arm"] == "unprotected" else recovered,
            needless,
            "" if high else f"{each['kept']:.0%}",
            "" if high else f"{each['replayed']:.0%}",
            "" if high else f"{each['rolled_back']:.0%}",
        ]
        text += f"| {' | '.join(cells)} |\n"
    return (
        text if lines else "No setting has been found yet at which a format fails now and then.\n"
    )


def scan_table(found: dict[str, list[Row]]) -> str:
    """How often each format failed in the first sweep."""
    text = f"| net | format | {' | '.join(f'lr {lr:g}' for lr in LRS)} |\n"
    text += f"|---|---|{'---|' * len(LRS)}\n"
    for net, of_net in found.items():
        limit = loss_limit([row for row in of_net if row["format"] == "bf16"])
        for format in ("bf16", *FORMATS):
            cells = []
            for lr in LRS:
                runs = [r for r in of_net if r["format"] == format and r["lr"] == lr]
                cells.append(f"{sum(failed(r, limit) for r in runs)}/{len(runs)}" if runs else "")
            text += f"| {net} | `{format}` | {' | '.join(cells)} |\n"
    return text


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Failure rates by arm over all cells, with intervals."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "thesis"  # the same picture is the same file
    import matplotlib.pyplot as plt

    from lightning_fp.study.intervals import wilson

    arms = ["bf16", *ARMS]
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    for place, arm in enumerate(arms):
        hits = sum(line["failed"] for line in lines if line["arm"] == arm)
        runs = sum(line["runs"] for line in lines if line["arm"] == arm)
        if not runs:
            continue
        low, high = wilson(hits, runs)
        axes.plot([low, high], [place, place], color="#0067a8", linewidth=2)
        axes.plot([hits / runs], [place], "o", color="#0067a8")
        axes.annotate(f" {hits}/{runs}", (high, place), va="center", fontsize=9)
    axes.set_yticks(range(len(arms)), ["BF16", *ARMS])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("share of runs that failed, 95% intervals")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--seeds", type=int, default=20, help="fresh ones, at most")
    parser.add_argument("--dir", type=Path, default=ROOT / "runs" / "thesis")
    parser.add_argument("--no-docs", action="store_true", help="print the tables only")
    options = parser.parse_args()
    clock = Clock(60 * options.minutes)
    found = scan(options.dir, clock)
    told = compare(options.dir, clock, found, options.seeds)
    lines = summary(found, told)
    print(scan_table(found), table(lines), sep="\n")
    if options.no_docs:
        return
    page = ROOT / "docs" / "runs-that-fail-by-themselves.md"
    put(page, "scan", scan_table(found))
    put(page, "arms", table(lines))
    plot(lines, ROOT / "docs" / "images" / "thesis.svg")
    result = {
        "command": "python benchmarks/study/thesis.py",
        "date": date.today().isoformat(),
        "lines": lines,
    }
    path = ROOT / "benchmarks" / "results" / "thesis.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
