"""How often precision is convicted where nothing is wrong.

    python benchmarks/healthy_pairs.py --jobs 2

Runs of four nets, in four formats, at three learning rates. Stretch after stretch of 16 steps the
watch's rules are asked for a verdict, of the run's own steps and of the same batches in high
precision from the same weights; gaps, controls and placebos where the rules ask for them. A run
that has ended is a line of the journal and is not made again: who is killed goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.proof.journal import measure  # noqa: E402
from benchmarks.proof.table import wilson  # noqa: E402

JOURNAL = ROOT / "benchmarks" / "results" / "healthy_pairs.jsonl"
WINDOW = 16
SEEDS = 3
PAIRS = {"regressor": 48, "batch-norm": 8, "vit": 4, "llama": 4}
"""By net, stretches of a run: most are of the cheapest."""


def run(work: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.proof.journal import quiet
    from benchmarks.proof.pairs import healthy_run

    quiet()
    return asdict(healthy_run(**work))


def key(row: dict[str, Any]) -> tuple[object, ...]:
    return tuple(row[name] for name in ("net", "format", "rate", "seed", "window"))


def main() -> None:
    from benchmarks.proof.pairs import FORMATS, RATES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--journal", type=Path, default=JOURNAL)
    options = parser.parse_args()
    work = [
        {"net": net, "format": format, "rate": rate, "seed": seed, "window": WINDOW, "pairs": pairs}
        for seed, rate, format in product(range(SEEDS), RATES, FORMATS)
        for net, pairs in PAIRS.items()
    ]
    rows = measure(options.journal, work, run, jobs=options.jobs, key=key)
    pairs, convicted = sum(r["pairs"] for r in rows), sum(len(r["convicted"]) for r in rows)
    findings: Counter[str] = Counter()
    for row in rows:
        findings.update(row["findings"])
    low, high = wilson(convicted, pairs)
    print(f"\n{pairs} healthy pairs, {convicted} convictions: {low:.2%} to {high:.2%}")
    for row in rows:
        for why in row["convicted"]:
            print(*key(row), why)
    report = {
        "command": "python benchmarks/healthy_pairs.py",
        "date": date.today().isoformat(),
        "pairs": pairs,
        "convictions": convicted,
        "interval": [low, high],
        "findings": dict(findings),
    }
    options.journal.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
