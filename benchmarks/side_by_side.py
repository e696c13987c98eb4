"""Measure alternatives side by side: interleaved runs in one process, ratios of medians.

Absolute times mean nothing on a shared machine; the ratio of two medians of interleaved runs does.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def medians(
    alternatives: dict[str, Callable[[], object]], *, runs: int = 15, warm_up: int = 3
) -> dict[str, float]:
    """Median seconds of each alternative; one run of each in turn, `runs` times."""
    return _interleaved(alternatives, time.perf_counter, runs, warm_up)


def interleaved_cpu_seconds(
    alternatives: dict[str, Callable[[], object]], *, runs: int = 15, warm_up: int = 3
) -> dict[str, float]:
    """The same in processor time, which says more where others use the machine."""
    return _interleaved(alternatives, time.process_time, runs, warm_up)


def _interleaved(
    alternatives: dict[str, Callable[[], object]],
    clock: Callable[[], float],
    runs: int,
    warm_up: int,
) -> dict[str, float]:
    for run in alternatives.values():
        for _ in range(warm_up):
            run()
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(runs):
        for name, run in alternatives.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def cpu_seconds(run: Callable[[], object], *, runs: int = 50) -> float:
    """Median processor time of one call: what a small claim in seconds is measured by."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "cpu": f"{platform.machine()} {capability}",
        "cpu_multiplies_bf16": bool(
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        ),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def report(claims: list[tuple[str, float, str, float]]) -> None:
    """Print and keep the results of one script.

    Args:
        claims: (what, measured, "<=" or ">=", target).
    """
    name = Path(sys.argv[0]).stem
    print(f"\n{name}  ({', '.join(f'{k} {v}' for k, v in machine().items())})")
    rows = []
    for what, measured, relation, target in claims:
        reached = measured <= target if relation == "<=" else measured >= target
        print(f"  {what:72} {measured:9.3f} {relation} {target:g}  {'yes' if reached else 'NO'}")
        rows.append(
            {
                "claim": what,
                "measured": round(measured, 4),
                "target": f"{relation} {target:g}",
                "reached": reached,
            }
        )
    RESULTS.mkdir(exist_ok=True)
    result = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "results": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
