"""How many runs the fallback saves, how often it blames precision wrongly, and what it costs.

    python benchmarks/rescue.py --seeds 10 --jobs 2

Each fault of precision is run from every seed in high precision and in FP8 under each arm; each
innocent one, and healthy runs, under the fallback. Beside the fallback: FP8 unprotected; leaving
out steps that are not finite; going back at every suspicion without touching a format; a switch to
high precision, layer by layer, as soon as a cast loses much. Nets, faults and arms are in `proof/`.
With `--loop plain` the same faults meet the fallback of a loop without a Trainer.
Every run that has ended is a line of the journal and is not run again: who is killed goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.proof.arms import LESS_MEMORY, RIVALS  # noqa: E402
from benchmarks.proof.journal import measure  # noqa: E402
from benchmarks.proof.table import line, rate, summary  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
JOURNAL = RESULTS / "rescue.jsonl"


def run(work: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.proof.journal import quiet
    from benchmarks.proof.tries import attempt

    quiet()
    row = asdict(attempt(work["case"], work["arm"], work["seed"], loop=work["loop"]))
    return {**row, "revision": work["revision"]}


def key(row: dict[str, Any]) -> tuple[str, str, int, str]:
    return row["case"], row["arm"], row["seed"], row.get("loop", "trainer")


def main() -> None:
    from benchmarks.proof.cases import CASES, HEALTHY, OTHER, PRECISION
    from benchmarks.proof.plain import runs_plainly

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rival-seeds", type=int, default=5, help="of the rival arms")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    arms = ["fallback", *LESS_MEMORY, *RIVALS]
    parser.add_argument("--arms", nargs="*", default=arms, choices=arms)
    loops = ["trainer", "plain"]
    parser.add_argument("--loop", choices=loops, default="trainer", help="what trains in FP8")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--journal", type=Path, default=JOURNAL)
    options = parser.parse_args()
    if options.loop == "plain":
        options.arms = [arm for arm in options.arms if arm in ("fallback", "unprotected")]
        options.cases = [name for name in options.cases if runs_plainly(CASES[name])]

    revision = _revision()
    work: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for case in options.cases:
            wanted = ["high precision", *options.arms] if case in PRECISION else ["fallback"]
            wanted = [arm for arm in wanted if arm not in RIVALS or seed < options.rival_seeds]
            work += [{"case": case, "arm": arm, "seed": seed} for arm in wanted]
    work = [{**each, "case": _shared(each["case"], each["arm"])} for each in work]
    for each in work:
        each["revision"] = revision
        each["loop"] = "trainer" if each["arm"] == HIGH else options.loop
    rows = measure(options.journal, work, run, jobs=options.jobs, key=key)
    rows = [row for row in rows if row["arm"] == HIGH or key(row)[-1] == options.loop]

    reference = {(r["case"], r["seed"]): r["final_loss"] for r in rows if r["arm"] == HIGH}
    reference |= {
        (case, seed): reference[_shared(case, HIGH), seed]
        for case in PRECISION
        for seed in {row["seed"] for row in rows}
        if (_shared(case, HIGH), seed) in reference
    }
    start = {name: case.start for name, case in CASES.items()}
    told: dict[str, dict[str, Any]] = {}
    for case in CASES:
        by_arm = {
            arm: [row for row in rows if (row["case"], row["arm"]) == (case, arm)] for arm in arms
        }
        found = {
            arm: summary(r, reference if case in PRECISION else {}, start)
            for arm, r in by_arm.items()
            if r
        }
        if not found:
            continue
        told[case] = found
        print(f"\n{case}")
        for arm, each in found.items():
            print(line(arm, each))
    for group, names in (("innocent", OTHER), ("healthy", HEALTHY)):
        seen = [told[name]["fallback"] for name in names if name in told]
        blamed, runs = sum(s["blamed"] for s in seen), sum(s["runs"] for s in seen)
        print(f"\n{group} runs in which precision was blamed: {rate(blamed, runs)}")
    report = {
        "command": "python benchmarks/rescue.py",
        "date": date.today().isoformat(),
        "summary": told,
    }
    options.journal.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


HIGH = "high precision"


def _shared(case: str, arm: str) -> str:
    """High precision does not notice the demo's faults, bit for bit (tests/test_faults.py)."""
    return "gpt healthy" if case.startswith("gpt ") and arm == HIGH else case


def _revision() -> str:
    told = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return told.stdout.strip()


if __name__ == "__main__":
    main()
