"""Which run is meant by a directory: the one that wrote there, or the newest below it."""

from __future__ import annotations

from pathlib import Path

_RECORDS = ("run.jsonl", "events.jsonl", "loss.csv", "statistics", "parity.jsonl", "eval_gap.csv")
_MORE = ("mismatch.csv", "gradients.jsonl", "metrics.csv")
"""What a run may leave in its directory."""

_BELOW = ("version_*/run.jsonl", "*/version_*/run.jsonl", "runs/*/version_*/run.jsonl")
"""Where a Trainer's runs are below its `default_root_dir`, or a logger's below its own."""


def newest_run(directory: str | Path) -> Path:
    """The directory itself if there are records, else that of the run below that began last.

    Args:
        directory: a run's, or one above: of several runs, or a Trainer's `default_root_dir`.

    Returns:
        The run's directory; `directory` where there is none.
    """
    path = Path(directory)
    if any((path / name).exists() for name in (*_RECORDS, *_MORE)):
        return path
    starts = [start for pattern in _BELOW for start in path.glob(pattern)]
    return max(starts, key=lambda start: start.stat().st_mtime).parent if starts else path
