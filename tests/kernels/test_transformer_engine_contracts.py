"""Transformer Engine's own Python code keeps to what this package takes for granted of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = Path(os.environ.get("TRANSFORMER_ENGINE", Path(sys.prefix) / "transformer-engine"))
"""Where `dev.py` unpacks the wheel without its libraries. It is not installed: other packages would
find it, and could not import it."""


def test_contracts() -> None:
    if not (PACKAGE / "transformer_engine").is_dir():
        pytest.skip(f"no Transformer Engine in {PACKAGE}; python dev.py setup unpacks it")
    options = "-m pytest -q --tb=short --color=no -p no:cacheprovider -p no:xdist"
    done = subprocess.run(
        [sys.executable, *options.split(), "tests/te_stub/contracts.py"],
        cwd=ROOT,
        env={**os.environ, "TRANSFORMER_ENGINE": str(PACKAGE)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
