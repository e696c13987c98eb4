"""The demo's second part: a rollout meets two faults, the run is saved, and the report says so."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from lightning_fp.demo.rollout import LOST, rollout_table, run_rollout
from lightning_fp.records.events import read_events


@pytest.mark.slow  # `make demo` runs it; the parts are tested in tests/callbacks
def test_the_rollout_is_shown_step_by_step_and_ends_well(tmp_path: Path):
    console = Console(file=StringIO(), width=200)
    result = run_rollout(tmp_path, console)
    shown = console.file.getvalue()
    kinds = [event.kind for event in read_events(result.run_dir)]
    for kind in ("limit", "suspect", "replay", "verdict", "demote", "rollback", "state", "stage"):
        assert kind in kinds
        assert f"{kind} " in shown or f"{kind}:" in shown
    (demotion,) = read_events(result.run_dir, kinds=["demote"])
    assert LOST in demotion.layers
    assert result.gap(result.unprotected) > 0.05
    assert result.gap(result.rescued) < 0.01
    assert "<html" in result.report.read_text()
    json.dumps(result.to_dict(), allow_nan=False)
    console.print(rollout_table(result))
