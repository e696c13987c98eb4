"""Transformer Engine's own Python code keeps to what this package takes for granted of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests import forked

PACKAGE = Path(os.environ.get("TRANSFORMER_ENGINE", Path(sys.prefix) / "transformer-engine"))
"""Where `dev.py` unpacks the wheel without its libraries. It is not installed: other packages would
find it, and could not import it."""


@pytest.mark.slow
def test_contracts(tmp_path: Path) -> None:
    if not (PACKAGE / "transformer_engine").is_dir():
        pytest.skip(f"no Transformer Engine in {PACKAGE}; python dev.py setup unpacks it")
    log = tmp_path / "log"
    contracts = forked.start(
        "tests.te_stub.run_contracts", log=log, environment={"TRANSFORMER_ENGINE": str(PACKAGE)}
    )
    contracts.join()
    assert contracts.exitcode == 0, log.read_text()[-8000:]
    assert " passed" in log.read_text()
