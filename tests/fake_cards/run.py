"""Runs the steps on fake cards, in a process of its own: backends are registered once for all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch.utils.backend_registration import (
    _setup_privateuseone_for_python_backend as register_backend,  # pyright: ignore
)

OPTIONS = [
    "-q",
    "--durations=6",
    "--tb=short",
    "--color=no",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
]
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins were imported already


class _TwoCards:
    """What torch asks of a backend's module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 2


def main(marked: str) -> None:
    """Run those with a mark, as `-m` takes it."""
    register_backend(rename="card", backend_module=_TwoCards())
    sys.exit(pytest.main([*OPTIONS, "-m", marked, str(Path(__file__).with_name("steps.py"))]))
