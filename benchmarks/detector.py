"""False alarms, delays and cost of the divergence detector, on a recorded and on made-up runs."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

import numpy as np
from side_by_side import cpu_seconds, report

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_fp import DivergenceDetector
from tests.stability.detect.curves import (
    FAULTS,
    HEALING,
    NOISES,
    RECORDED,
    SCHEDULES,
    AmaxRecord,
    Curve,
    healthy,
    recorded,
    watch,
    with_fault,
)

PLACES = {"recorded": 40, "made up": 6}
Found = dict[str, dict[str, list[AmaxRecord]]]


def measure(curves: dict[str, list[Curve]]) -> tuple[dict[str, tuple[int, int, int]], Found]:
    """Suspicions, verdicts and steps of the healthy curves, and what is said about faults."""
    alarms: dict[str, tuple[int, int, int]] = {}
    found: Found = {}
    for group, members in curves.items():
        suspicions = verdicts = steps = 0
        for seed, curve in enumerate(members):
            healthy_run = watch(curve, loss_only=True)
            suspicions += len(healthy_run.suspicions)
            verdicts += len(healthy_run.verdicts)
            steps += len(curve)
            rng = np.random.default_rng(seed)
            for onset in rng.integers(1_000, len(curve) - 1_000, PLACES[group]).tolist():
                for fault in (*FAULTS, *HEALING[2:]):
                    run = watch(
                        with_fault(curve, fault, onset),
                        state=healthy_run.states[onset],
                        start=onset,
                        loss_only=True,
                    )
                    found.setdefault(fault.name, {}).setdefault(group, []).append(run)
        alarms[group] = (suspicions, verdicts, steps)
    return alarms, found


def microseconds() -> float:
    """Of one step with all signals."""
    detector = DivergenceDetector()
    curve = healthy(0, "normal", "cosine", steps=2_000)
    losses, rates = curve.loss.tolist(), curve.lr.tolist()

    def run() -> None:
        state = detector.init()
        for loss, lr in zip(losses, rates, strict=True):
            state, _ = detector.step(state, loss=loss, grad_norm=loss, lr=lr, update_ratio=loss)

    return cpu_seconds(run, runs=10) / len(losses) * 1e6


def main() -> None:
    curves = {
        "made up": [
            healthy(seed, noise, schedule)
            for seed, (noise, schedule) in enumerate((n, s) for n in NOISES for s in SCHEDULES[:3])
        ]
    }
    if RECORDED.is_file():
        curves["recorded"] = [recorded()]
    else:
        print(f"{RECORDED} is missing: the recorded run is left out")
    alarms, found = measure(curves)
    claims: list[tuple[str, float, str, float]] = []
    for group, (suspicions, verdicts, steps) in alarms.items():
        print(f"{group}: {steps} healthy steps, {suspicions} suspicions, {verdicts} verdicts")
        claims.append((f"suspicions per 10k steps, {group}", suspicions / steps * 1e4, "<=", 1))
        claims.append((f"false verdicts, {group}", verdicts, "<=", 0))
    print(f"\n| fault | {' | '.join(f'{g}: noticed | delay | verdict' for g in alarms)} |")
    print("|---" * (1 + 3 * len(alarms)) + "|")
    for fault, groups in found.items():
        cells = []
        for runs in groups.values():
            delays = [run.suspicions[0] for run in runs if run.suspicions]
            verdicts = sum(bool(run.verdicts) for run in runs)
            cells += [
                f"{len(delays) / len(runs):.0%}",
                f"{median(delays):.0f}" if delays else "–",
                f"{verdicts / len(runs):.0%}",
            ]
        print(f"| {fault} | {' | '.join(cells)} |")
    claims.append(("microseconds a step, all signals", microseconds(), "<=", 50))
    report(claims)


if __name__ == "__main__":
    main()
