"""The README's picture: the demo's rollout with two planted faults, with and without the fallback.

`python docs/images/saved_run.py` trains the three runs of the demo's second part (about two minutes
on two CPU cores) and writes `docs/images/saved-run.svg`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib as mpl
from rich.console import Console

from lightning_fp.demo.rollout import LOST_START, OUTLIERS_START, RolloutResult, run_rollout
from lightning_fp.records.events import Demotion

PICTURE = Path(__file__).with_name("saved-run.svg")
WINDOW = 16
"""Steps that each point of a curve is the mean of."""
FIRST = 100
"""Step that the picture begins at: before it all three runs are alike, and steep."""


def running_mean(losses: list[float]) -> list[float]:
    """The mean of the last `WINDOW` losses at each step."""
    return [
        sum(losses[max(0, step - WINDOW + 1) : step + 1]) / min(WINDOW, step + 1)
        for step in range(len(losses))
    ]


def draw(result: RolloutResult, path: Path) -> None:
    """Three losses by step, where the faults begin, and where their cause was found."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "saved-run"  # the same picture is the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    curves = (
        ("without FP8", result.high, "#c4c4c4", 6.0),  # wide, so that it is seen beneath
        ("in FP8, unprotected", result.unprotected, "#b4420a", 1.8),
        ("in FP8, with PrecisionFallback", result.rescued, "#0067a8", 1.8),
    )
    for name, run, color, width in curves:
        means = running_mean(run.losses)
        axes.plot(range(FIRST, len(means)), means[FIRST:], color=color, linewidth=width, label=name)
        if run is not result.high:
            gap = f"{result.gap(run):+.1%}"
            axes.annotate(f" {gap}", (len(means) - 1, means[-1]), color=color, va="center")
    low, high = axes.get_ylim()
    for start in (OUTLIERS_START, LOST_START):
        axes.axvline(start, color="#b4420a", linewidth=0.8, linestyle=":")
    axes.text(OUTLIERS_START - 3, high, "faults begin", color="#b4420a", ha="right", va="top")
    for change in result.events:
        if isinstance(change, Demotion):
            axes.plot([change.step], [low], "^", color="#0067a8", clip_on=False, markersize=9)
            axes.annotate(
                "  cause found, back to a snapshot",
                (change.step, low),
                color="#0067a8",
                va="bottom",
            )
    axes.set_ylim(low, high)
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, mean of {WINDOW} steps")
    axes.legend(frameon=False, loc="lower left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        result = run_rollout(Path(directory), Console())
    draw(result, PICTURE)
    print(PICTURE)


if __name__ == "__main__":
    main()
