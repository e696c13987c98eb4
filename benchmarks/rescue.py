"""How many runs the fallback saves, how many layers it demotes without need, and what it costs.

    python benchmarks/rescue.py --seeds 10 --jobs 2

Each fault is run from every seed in high precision, and in FP8 with each protection. Rates come
with 95% Wilson intervals. Beside the fallback: FP8 unprotected, leaving out non-finite steps alone,
and the control arm, which rolls back at every suspicion and lets the data move on but touches no
format: what it saves is not owed to precision.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from lightning_fp.demo.faults import CASES, Trial, trial
from lightning_fp.demo.faults.trial import HEALTHY, Arm

RESULTS = Path(__file__).parent / "results" / "rescue.json"
SAVED = 0.01
"""A run is saved if its final loss is within this share of high precision's."""

PRECISION = ["outliers", "gradient-overflow", "stuck-scale"]
OTHER = ["learning-rate", "nan-data", "shuffled-labels"]
ARMS: list[Arm] = ["unprotected", "skip-step", "rollback and skip", "fallback"]


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a rate (Wilson 1927)."""
    if not count:
        return (math.nan, math.nan)
    rate = hits / count
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + (z / (2 * count)) ** 2)
    return (max(0.0, centre - half), min(1.0, centre + half))


def text(hits: int, count: int) -> str:
    low, high = wilson(hits, count)
    return f"{hits}/{count} [{low:.0%}, {high:.0%}]"


def one(arguments: tuple[str, Arm, int]) -> Trial:
    import logging
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    return trial(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--control-seeds", type=int, default=5, help="of the other arms")
    parser.add_argument("--healthy-seeds", type=int, default=20)
    parser.add_argument("--cases", nargs="*", default=[*PRECISION, *OTHER, HEALTHY])
    parser.add_argument("--arms", nargs="*", default=ARMS, choices=ARMS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()

    # High precision does not notice the faults of precision, bit for bit (tests/test_faults.py), so
    # its healthy runs are the reference for all.
    work: list[tuple[str, Arm, int]] = []
    seeds = max(options.seeds, options.healthy_seeds)
    work += [(HEALTHY, "high precision", seed) for seed in range(seeds)]
    for case in options.cases:
        counts: dict[Arm, int] = {"fallback": options.seeds}
        if case == HEALTHY:
            counts = {"fallback": options.healthy_seeds}
        elif CASES[case].cause == "precision":
            counts |= {arm: options.control_seeds for arm in options.arms if arm != "fallback"}
        work += [(case, arm, seed) for arm, count in counts.items() for seed in range(count)]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        trials = []
        for done in pool.map(one, work):
            trials.append(done)
            print(
                f"{done.case}, {done.arm}, seed {done.seed}: loss {done.final_loss:.4f}", flush=True
            )
    table(trials)
    options.out.write_text(
        json.dumps(
            {
                "command": "python benchmarks/rescue.py",
                "date": date.today().isoformat(),
                "trials": [asdict(one) for one in trials],
            },
            indent=1,
        )
        + "\n"
    )


def table(trials: list[Trial]) -> None:
    """Print rates by case and arm."""
    high = {t.seed: t for t in trials if t.arm == "high precision"}
    for case in dict.fromkeys(t.case for t in trials):
        print(f"\n{case}")
        for arm in dict.fromkeys(t.arm for t in trials if t.case == case):
            if arm == "high precision":
                continue
            runs = [t for t in trials if (t.case, t.arm) == (case, arm)]
            gaps = [t.gap(high[t.seed]) for t in runs]
            gap = median([g for g in gaps if math.isfinite(g)] or [math.nan])
            line = f"  {arm:18} gap {gap:+7.2%}"
            if case in CASES and CASES[case].cause == "precision":
                saved = sum(abs(g) <= SAVED or g < 0 for g in gaps)
                line += f"  saved {text(saved, len(runs))}"
                if arm == "fallback":
                    enough = sum(t.blamed and t.no_further_than_needed for t in runs)
                    line += f"  right layers, no further than needed {text(enough, len(runs))}"
            elif arm == "fallback":
                line += f"  precision blamed {text(sum(t.blamed for t in runs), len(runs))}"
            if arm == "fallback":
                replayed = sum(t.replayed for t in runs) / len(runs)
                back = sum(t.rolled_back for t in runs) / len(runs)
                line += f"  replayed {replayed:.0f}, rolled back {back:.0f} steps"
            print(line)


if __name__ == "__main__":
    main()
