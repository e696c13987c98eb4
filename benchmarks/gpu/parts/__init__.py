"""What the lane measures, in order of worth; each part is the module of its name."""

from __future__ import annotations

SHARES: dict[str, float] = {
    "machine": 2,
    "gpu_tests": 14,
    "gemms": 24,
    "stack": 20,
    "overhead": 12,
    "host_reads": 5,
    "recompiles": 10,
    "snapshots": 5,
    "rescue": 8,
}
"""Parts of the time; what one leaves goes to those after it."""
