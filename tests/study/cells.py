"""Rows of a sweep's table, as its cells would have left them."""

from __future__ import annotations

from typing import Any

from lightning_fp.study.sweep.verdict import closing_steps

STEPS = 50
"""Planned of each run."""


def row(format: str, lr: float, seed: int | str, final: float | None, **changes: Any) -> dict:
    """A run that ends at a loss, or diverges half way.

    Args:
        format: of its layers.
        lr: its learning rate.
        seed: its seed.
        final: the loss; None: it diverged.
        changes: of columns.
    """
    ends = 6.0 if final is None else final
    falling = STEPS - closing_steps(STEPS) + 1  # the rest is the loss at the end
    return {
        "id": f"{format}-{lr}-{seed}",
        "format": format,
        "lr": lr,
        "seed": seed,
        "setting": "",
        "diverged": final is None,
        "first_loss": 5.5,
        "final_loss": final,
        "spikes": 1,
        "steps": STEPS if final is not None else STEPS // 2,
        "cpu_seconds": 1.0,
        "curve": [5.5 + (ends - 5.5) * min(1, (i + 1) / falling) for i in range(STEPS)],
        "error": None,
        "kept": 1.0,
        "replayed": 0,
        "rolled_back": 0,
        "skipped": 0,
        **changes,
    }
